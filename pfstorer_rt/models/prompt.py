"""The prompt encoder: transformers' CLIPTextModel with one learned token; the ids are CLIP tokens or bytes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pfstorer_rt.config import BaseConfig
from pfstorer_rt.errors import SettingError

SUBJECT = "S*"
PLACEHOLDER = -1
"""Token id of the learned token."""
CLIP_WORDS = {
    "a": 320,
    "photo": 1125,
    "of": 539,
    "face": 1710,
    "person": 2533,
    "man": 786,
    "woman": 2308,
}
"""CLIP ids of the words in the supported prompts; the whole vocabulary is not needed."""


def tokenize(text: str, config: BaseConfig) -> torch.Tensor:
    """Convert a prompt to token ids (1, L): start, words, end, padding with 0 (as in open_clip).

    `S*` becomes `PLACEHOLDER`. Raises `ValueError` for a word outside the vocabulary or a prompt that is too long.
    """
    settings = config.text
    ids: list[int] = [settings["bos_token_id"]]
    for i, word in enumerate(text.split()):
        if word == SUBJECT:
            ids.append(PLACEHOLDER)
        elif config.tokenizer == "bytes":
            ids.extend((" " * (i > 0) + word).encode())
        elif word in CLIP_WORDS:
            ids.append(CLIP_WORDS[word])
        else:
            raise SettingError(f"prompt word {word!r}: expected one of {', '.join(CLIP_WORDS)}")
    ids.append(settings["eos_token_id"])
    length = settings["max_position_embeddings"]
    if len(ids) > length:
        raise SettingError(f"prompt {text!r} has {len(ids)} tokens; at most {length} fit")
    return torch.tensor([ids + [0] * (length - len(ids))])


def token_position(ids: torch.Tensor, token: int) -> int:
    """Return the position of the first `token` in ids (1, L)."""
    return int((ids[0] == token).nonzero()[0])


class PromptEncoder(nn.Module):
    """Encodes token ids; the learned token replaces `PLACEHOLDER`."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_base_config(cls, config: BaseConfig) -> PromptEncoder:
        """Build an untrained encoder with the sizes of a base."""
        return cls(CLIPTextModel(CLIPTextConfig(pad_token_id=0, **config.text)))

    def word_embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean embedding (D,) of the ids between start and end, the initial value of a learned token."""
        end = int((ids[0] == self.model.config.eos_token_id).nonzero()[0])
        return self.model.get_input_embeddings().weight[ids[0, 1:end]].mean(0).detach().clone()

    def forward(self, ids: torch.Tensor, token: torch.Tensor | None = None) -> torch.Tensor:
        """ids (B, L), token (D,) or None -> context (B, L, D) after the final norm.

        Without a token, `PLACEHOLDER` must not be among the ids. This is not checked here, because the check would wait
        for the device.
        """
        is_token = ids == PLACEHOLDER

        def insert(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output if token is None else torch.where(is_token[..., None], token.to(output.dtype), output)

        hook = self.model.get_input_embeddings().register_forward_hook(insert)
        try:
            context: torch.Tensor = self.model(input_ids=ids.clamp(min=0)).last_hidden_state
        finally:
            hook.remove()
        return context
