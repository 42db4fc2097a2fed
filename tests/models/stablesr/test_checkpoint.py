import json
import pickle
import tracemalloc
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_sd21 import SMALL_SD21
from torch import nn

from pfstorer_rt.config import PRESETS
from pfstorer_rt.errors import BadFileError, PFStorerError
from pfstorer_rt.models.base import assemble, build_base, load_base
from pfstorer_rt.models.cfw import ControllableFeatureWrapping
from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint
from pfstorer_rt.models.stablesr.conversion import convert_structure_encoder, spade_name
from pfstorer_rt.models.stablesr.importing import (
    check_finite,
    check_fit,
    convert,
    convert_cfw,
    import_base,
    match_text_names,
    name_kind,
    read_tiny_autoencoder,
)
from pfstorer_rt.models.structure import StructureEncoder

WIDTH, HEADS, OUT, GROUPS = 8, 2, 8, 4


class ResBlock(nn.Module):
    """StableSR's residual block under StableSR's names, written from the formulas."""

    def __init__(self, entry, channels, temb):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, entry), nn.SiLU(), nn.Conv2d(entry, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(temb, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Dropout(0), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if entry == channels else nn.Conv2d(entry, channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class AttentionBlock(nn.Module):
    """Heads are split before q, k and v; the scale is put on both q and k."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, h * w)).reshape(b * HEADS, 3 * c // HEADS, h * w)
        q, k, v = qkv.split(c // HEADS, dim=1)
        scale = (c // HEADS) ** -0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, h * w)
        return x + self.proj_out(a).reshape(b, c, h, w)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.op(x)


class Reference(nn.Module):
    """EncoderUNetModelWT at multipliers 1 1 2 2, attention at all levels but the deepest."""

    def __init__(self):
        super().__init__()
        temb = 4 * WIDTH
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, temb), nn.SiLU(), nn.Linear(temb, temb))
        blocks, width, taps = [nn.ModuleList([nn.Conv2d(4, WIDTH, 3, padding=1)])], WIDTH, []
        for level, channels in enumerate((WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH)):
            for _ in range(2):
                parts = [ResBlock(width, channels, temb)] + ([AttentionBlock(channels)] if level < 3 else [])
                blocks.append(nn.ModuleList(parts))
                width = channels
            taps.append(width)
            if level < 3:
                blocks.append(nn.ModuleList([Down(width)]))
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, temb), AttentionBlock(width), ResBlock(width, width, temb)]
        )
        self.fea_tran = nn.ModuleList(ResBlock(w, OUT, temb) for w in taps)

    def forward(self, x, t):
        half = WIDTH // 2
        frequency = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
        angle = t[:, None].float() * frequency
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], -1))
        h, taps = self.input_blocks[0][0](x), []
        for block in list(self.input_blocks)[1:]:
            if isinstance(block[0], Down):
                taps.append(h)
            for part in block:
                h = part(h, emb)
        for part in self.middle_block:
            h = part(h, emb)
        taps.append(h)
        return [tran(tap, emb) for tran, tap in zip(self.fea_tran, taps, strict=True)]


def test_an_imported_structure_encoder_agrees_with_stablesr():
    torch.manual_seed(0)
    reference = Reference().eval()
    for p in reference.parameters():  # norms too, which start at one and zero and would hide a mix-up
        nn.init.normal_(p, std=0.3)
    ours = StructureEncoder(4, WIDTH, (1, 1, 2, 2), HEADS, OUT, 2, GROUPS).eval()
    state = convert_structure_encoder(dict(reference.state_dict()), HEADS)
    check_fit(ours, state, "test")
    ours.load_state_dict(state)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 999])
    with torch.no_grad():
        maps, expected = ours(x, t), reference(x, t)
    for size, wanted in zip((16, 8, 4, 2), expected, strict=True):
        torch.testing.assert_close(maps[size], wanted, rtol=1e-4, atol=1e-5)


def test_spades_follow_the_published_table():
    inputs = {1: (0, 0), 2: (0, 1), 4: (1, 0), 5: (1, 1), 7: (2, 0), 8: (2, 1), 10: (3, 0), 11: (3, 1)}
    for n, (i, j) in inputs.items():
        assert spade_name(f"input_blocks.{n}.0.spade.x") == f"down_blocks.{i}.resnets.{j}.spade.x"
    assert spade_name("middle_block.2.spade.mlp_shared.0.bias") == "mid_block.resnets.1.spade.mlp_shared.0.bias"
    assert spade_name("output_blocks.7.0.spade.x") == "up_blocks.2.resnets.1.spade.x"


class Bomb:
    def __reduce__(self):
        import os

        return os.system, ("touch exploded",)


def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Bomb()}, tmp_path / "bad.ckpt")
    with pytest.raises(BadFileError, match="system"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "exploded").exists()


class Program(nn.Module):
    """A TorchScript module that writes a file when it is loaded."""

    def __init__(self, target):
        super().__init__()
        self.target, self.tensor, self.training = target, torch.zeros(1), False

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.target, self.tensor, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.target, self.tensor, self.training = state
        torch.save(self.tensor, self.target)


def test_a_torchscript_program_is_refused_and_not_run(tmp_path):
    path, written = tmp_path / "stablesr.ckpt", tmp_path / "written"
    torch.jit.script(Program(str(written))).save(str(path))
    torch.jit.load(str(path))
    assert written.exists(), "loading it in the usual way runs it"
    written.unlink()
    with pytest.raises(BadFileError, match="TorchScript program"):
        read_checkpoint(path)
    assert not written.exists()


def test_a_large_index_in_a_pickle_takes_no_memory(tmp_path):
    """The unpickler in C allocates an array of twice this length for its memo."""
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02]r" + (2**25).to_bytes(4, "little") + b".")
    tracemalloc.start()
    with pytest.raises(BadFileError, match="no readable checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_lightning_objects_are_ignored_and_optimizer_state_is_not_read(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
    weights = OrderedDict(a=torch.arange(4.0), b=torch.ones(2, dtype=torch.float16))
    data = {
        "state_dict": weights,
        "callbacks": {"x": module.ModelCheckpoint()},
        "optimizer_states": [{"m": torch.ones(9)}],
    }
    torch.save(data, tmp_path / "lightning.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.delitem(sys.modules, name)
    found = read_checkpoint(tmp_path / "lightning.ckpt")
    assert set(found) == {"a", "b"} and torch.equal(found["a"], weights["a"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"state_dict": {}})])
def test_damaged_checkpoints_are_bad_files(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    expected = rf"x\.ckpt: {len(content)} bytes that are no readable checkpoint; .*: copy it again|x\.ckpt: no tensors"
    with pytest.raises(BadFileError, match=expected):
        read_checkpoint(tmp_path / "x.ckpt")


def ldm_names_of_parts(base, reference):
    """StableSR's own parts (SPADEs and structure encoder) under StableSR's names."""
    inverse = {
        "down_blocks": lambda i, j: f"input_blocks.{1 + 3 * i + j}.0",
        "up_blocks": lambda i, j: f"output_blocks.{3 * i + j}.0",
    }
    tensors = {f"structcond_stage_model.{k}": v for k, v in reference.state_dict().items()}
    for key, value in base.unet.state_dict().items():
        if ".spade." not in key:
            continue
        place, leaf = key.split(".spade.")
        parts = place.split(".")
        block = (
            f"middle_block.{2 * int(parts[2])}"
            if parts[0] == "mid_block"
            else inverse[parts[0]](int(parts[1]), int(parts[3]))
        )
        tensors[f"model.diffusion_model.{block}.spade.{leaf}"] = value
    return tensors


def test_parts_checkpoint_with_sd_directory_becomes_a_base(tmp_path):
    config = replace(SMALL_SD21, structure=replace(SMALL_SD21.structure, heads=HEADS))
    spades, sd = build_base(config, seed=1), build_base(config, seed=2)
    reference = Reference()
    torch.save({"state_dict": ldm_names_of_parts(spades, reference)}, tmp_path / "webui_768v.ckpt")
    sd.save(tmp_path / "sd")
    made = import_base(
        tmp_path / "webui_768v.ckpt", tmp_path / "out", tmp_path / "sd", torch.float32, "v_prediction", config=config
    )
    assert made.from_name == {"tile": 768}
    base = load_base(tmp_path / "out")
    assert base.config.prediction_type == "v_prediction" and base.config.tile == 768
    for key, value in base.unet.state_dict().items():
        assert torch.equal(value, (spades if ".spade." in key else sd).unet.state_dict()[key]), key
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(base.structure_encoder(x, t)[16], reference(x, t)[0], rtol=1e-4, atol=1e-5)
    assert F.mse_loss(base.encode(torch.zeros(1, 3, 64, 64)), sd.encode(torch.zeros(1, 3, 64, 64))) == 0


def test_keys_that_do_not_fit_are_listed(tmp_path):
    base = build_base("nano")
    state = dict(base.vae.state_dict())
    gone = next(iter(state))
    del state[gone]
    state["surplus"] = torch.ones(1)
    with pytest.raises(BadFileError, match=f"missing {gone}.*unexpected surplus"):
        check_fit(base.vae, state, "x.ckpt: vae")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.13.0.weight",
        "model.diffusion_model.surplus.weight",
        "first_stage_model.encoder.surplus.weight",
        "cond_stage_model.model.transformer.resblocks.0.surplus.weight",
        "structcond_stage_model.fea_tran.7.weight",
        "structcond_stage_model.out.weight",
        "surplus.weight",
        "surplus",
        "cond_stage_model.model.foo.weight",
        "cond_stage_model.surplus",
    ],
)
def test_tensors_that_no_network_has_are_refused_by_name(tmp_path, key):
    # diffusers' converters ignore unknown tensors
    write_published(tmp_path / "stablesr.ckpt", {key: torch.ones(1)})
    with pytest.raises(BadFileError, match=r"unexpected .*" + key.split("model.")[-1].split(".", 2)[-1]):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_without_fractions_are_refused(tmp_path, dtype):
    key = "model.diffusion_model.out.2.bias"
    write_published(tmp_path / "stablesr.ckpt", {key: torch.zeros(4, dtype=dtype)})
    with pytest.raises(BadFileError, match=rf"{key} is {dtype}, expected floating-point weights"):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out")


def test_tensors_that_share_their_values_are_refused(tmp_path):
    shared = torch.zeros(8)
    keys = [f"model.diffusion_model.{name}" for name in ("out.2.bias", "surplus.weight")]
    write_published(tmp_path / "stablesr.ckpt", {keys[0]: shared[:4], keys[1]: shared[4:]})
    with pytest.raises(BadFileError, match=rf"{keys[1]} shares the values of {keys[0]}"):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out")


def test_a_checkpoint_of_averaged_weights_is_named_as_such(tmp_path):
    structure = {"structcond_stage_model.time_embed.0.bias": torch.ones(4)}
    for more in ({}, structure):
        torch.save({"state_dict": {"model_ema.diffusion_modelout2bias": torch.ones(4), **more}}, tmp_path / "ema.ckpt")
        with pytest.raises(BadFileError, match=r"ema\.ckpt: only the EMA \(averaged\) weights"):
            import_base(tmp_path / "ema.ckpt", tmp_path / "out")


def test_a_wrong_shape_inside_the_structure_encoder_is_listed(tmp_path):
    wrong = {"structcond_stage_model.middle_block.1.qkv.weight": torch.zeros(7, 512, 1)}
    write_published(tmp_path / "stablesr.ckpt", wrong)
    with pytest.raises(BadFileError, match=r"mid_attention\.attn\.to_q\.weight is \[7, 512, 1\], expected"):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path / "v2-1.ckpt")
    with pytest.raises(BadFileError, match=r"v2-1\.ckpt: no structcond_stage_model.*not SD 2\.1 itself"):
        import_base(tmp_path / "v2-1.ckpt", tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_beyond_the_range_of_fp16_are_refused(value):
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, value]), "count": torch.tensor(10**9)}
    with pytest.raises(BadFileError, match=r"fit, 1: bad has NaN or values beyond 65504"):
        check_finite(state, torch.float16, "x")
    if value == value:
        check_finite(state, torch.float32, "x")


def test_a_checkpoint_without_feature_wrapping_is_refused(tmp_path):
    torch.save({"decoder.conv_in.bias": torch.ones(1)}, tmp_path / "vqgan.ckpt")
    write_published(tmp_path / "stablesr.ckpt")
    with pytest.raises(BadFileError, match=r"^vqgan\.ckpt: no decoder\.fusion_layer"):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out", cfw=tmp_path / "vqgan.ckpt")


def test_too_little_disk_space_is_reported_before_tensors_are_read(tmp_path, set_free_space):
    # Reading the tensors would find the value that is not finite.
    write_published(tmp_path / "stablesr.ckpt", {"model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))})
    set_free_space(2 * 10**9)
    # 1.5e9 values of two bytes
    with pytest.raises(PFStorerError, match=r"out: 27\d\d MB are needed, 2000 MB are free"):
        import_base(tmp_path / "stablesr.ckpt", tmp_path / "out", prediction_type="epsilon")


def test_the_folder_of_sd_cannot_be_the_output(tmp_path):
    (tmp_path / "sd").mkdir()
    with pytest.raises(BadFileError, match=r"its SD 2\.1 source files"):
        import_base(tmp_path / "x.ckpt", tmp_path / "sd", sd=tmp_path / "sd")


def test_other_training_data_in_a_checkpoint_is_ignored(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.utilities")
    attributes = {
        "__module__": "pytorch_lightning.utilities",
        "__reduce__": lambda self: (type(self), (), None, None, iter([("lr", 1e-4)])),
    }
    module.AttributeDict = type("AttributeDict", (dict,), attributes)
    for name, made in (("pytorch_lightning", types.ModuleType("pytorch_lightning")), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, made)
    data = {
        "state_dict": {"a": torch.ones(2), 7: torch.ones(1)},
        "hyper_parameters": module.AttributeDict(),
        "best": np.float64(0.5),
        "kinds": {torch.float32, torch.Size([1])},
        "names": {"x"},
    }
    torch.save(data, tmp_path / "lightning.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.delitem(sys.modules, name)
    assert set(read_checkpoint(tmp_path / "lightning.ckpt")) == {"a"}


def test_a_checkpoint_of_parts_needs_sd(tmp_path):
    config = replace(SMALL_SD21, structure=replace(SMALL_SD21.structure, heads=HEADS))
    torch.save(ldm_names_of_parts(build_base(config), Reference()), tmp_path / "parts.ckpt")
    with pytest.raises(BadFileError, match=r"^parts\.ckpt: .*give SD 2\.1-base"):
        import_base(tmp_path / "parts.ckpt", tmp_path / "out", config=config)
    assert not (tmp_path / "out" / "config.json").exists()


def manifest(name, prefix=""):
    """Tensors without memory, under the names and with the shapes of a published file."""
    shapes = json.loads((Path(__file__).parent / "manifests" / f"{name}.json").read_text())
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def write_published(path, changes=None):
    """Write the published StableSR checkpoint with all values zero: a small file, because each tensor is one value."""
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in whole_checkpoint().items()}
    torch.save({"state_dict": zeros | (changes or {})}, path)


def whole_checkpoint():
    parts = ("unet", "structcond", "first_stage", "text_encoder", "schedule_buffers")
    return {key: tensor for part in parts for key, tensor in manifest(f"stablesr_{part}").items()}


def test_every_tensor_of_the_published_files_is_converted():
    states = convert(whole_checkpoint(), PRESETS["sd21"], None)
    with torch.device("meta"):
        modules = assemble(PRESETS["sd21"]).modules()
    states["text_encoder"] = match_text_names(states["text_encoder"], modules["text_encoder"])
    for name, module in modules.items():
        check_fit(module, states[name], name)


@pytest.mark.parametrize("network", ["unet", "vae"])
def test_the_conversion_follows_the_published_map(network):
    table = json.loads((Path(__file__).parent / "manifests" / f"map_stablesr_{network}_to_diffusers.json").read_text())
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[network]
    tensors = {k: v for k, v in whole_checkpoint().items() if not k.startswith(prefix)}
    marked = manifest({"unet": "stablesr_unet", "vae": "stablesr_first_stage"}[network])
    sizes = {}
    for number, key in enumerate(marked):  # every tensor has its own number as values
        source = key if key.startswith(prefix) else prefix + key
        sizes[source.removeprefix(prefix)] = number + 1
        tensors[source] = torch.full((2, 2, 1, 1) if "attn_1" in source else (2,), float(number + 1))
    converted = convert(tensors, PRESETS["sd21"], None)[network]
    assert len(converted) == len(table)
    for source, place in table.items():
        assert float(converted[place].flatten()[0]) == sizes[source], (source, place)


def test_the_published_feature_wrapping_is_converted():
    states = convert(whole_checkpoint(), PRESETS["sd21"], None)
    own = manifest("cfw_vqgan") | {"loss.discriminator.main.0.weight": torch.empty(1, device="meta")}
    fusion = {k: v for k, v in own.items() if "fusion_layer" in k}
    tensors, settings = convert_cfw(fusion, states["vae"], PRESETS["sd21"])
    with torch.device("meta"):
        check_fit(ControllableFeatureWrapping(**settings), tensors, "cfw")
        everything = convert_cfw(own, {}, PRESETS["sd21"])
        check_fit(ControllableFeatureWrapping(**everything[1]), everything[0], "cfw")


@pytest.mark.parametrize(
    "name, tile, steps",
    [
        ("stablesr_000117.ckpt", 512, 200),
        ("webui_768v_139.ckpt", 768, 200),
        ("stablesr_turbo.ckpt", 512, 4),
        ("StableSR_Turbo.ckpt", 512, 4),
        ("WebUI-768V.ckpt", 768, 200),
        ("my 768 px.ckpt", 768, 200),
        ("run_20231768.ckpt", 512, 200),
        ("turbocharged.ckpt", 512, 200),
    ],
)
def test_settings_are_derived_from_the_names_of_published_files(name, tile, steps):
    config = replace(PRESETS["sd21"], **name_kind(name))
    assert (config.tile, config.steps) == (tile, steps)


@pytest.mark.parametrize("name", ["my_face.ckpt", "stablesr_768v.ckpt", "stablesr_000117.ckpt"])
def test_the_prediction_is_never_derived_from_a_name(tmp_path, name):
    write_published(tmp_path / name)
    with pytest.raises(BadFileError, match=r"expected epsilon or v_prediction") as caught:
        import_base(tmp_path / name, tmp_path / "out")
    assert caught.value.setting == "prediction_type" and not (tmp_path / "out").exists()


def test_taesds_own_files_are_read(tmp_path):
    from diffusers import AutoencoderTiny

    expected = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    # TAESD is two plain sequences; its decoder's first member is a clamp, without weights.
    for half, before in (("encoder", 0), ("decoder", 1)):
        layers = getattr(expected, half).layers
        sequence = torch.nn.Sequential(*[torch.nn.Identity()] * before, *layers)
        save_file({k: v.clone() for k, v in sequence.state_dict().items()}, tmp_path / f"taesd_{half}.safetensors")
    state = read_tiny_autoencoder(tmp_path)
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in expected.state_dict().items())
