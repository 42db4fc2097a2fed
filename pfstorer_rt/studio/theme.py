"""The look of the page: colours and system fonts for Gradio's theme, and the style sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
SCRIPTS = ("viewer.js", "labels.js", "keyboard.js")
ACCENT = gr.themes.Color(
    *("#eef7f5", "#d6ece7", "#b0dad1", "#7fc1b4", "#4aa292", "#227d6d", "#1b6c5e", "#16594e", "#12483f", "#0e3a33"),
    "#082520",
    name="accent",
)
PAPER = gr.themes.Color(
    *("#faf9f7", "#f3f1ed", "#e6e3dc", "#d2cdc3", "#a29c90", "#6d685e", "#545047", "#403d36", "#2b2925", "#1d1c19"),
    "#131210",
    name="paper",
)


def theme() -> Any:
    """Return the theme; it loads no font from a server."""
    base = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=PAPER,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_lg,
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="#b9b3a7",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        block_background_fill="#ffffff",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="#d2cdc3",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="#b9b3a7",
        block_shadow="0 1px 2px rgb(0 0 0 / 5%)",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_cancel_text_color="#9c3a22",
        button_cancel_text_color_dark="#f0a48f",
        input_border_width="1px",
        checkbox_border_color="#8d877b",
        checkbox_border_color_dark="#847e73",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_950",
        input_border_color="#8d877b",
        input_border_color_dark="#847e73",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="#b9b3a7",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def style() -> str:
    """Return the style sheet of the page."""
    return (Path(__file__).parent / "studio.css").read_text()


def scripts() -> str:
    """Return the viewer and the page's own scripts, as one element for the head of the page."""
    folder = Path(__file__).parent
    return "".join(f"<script>{(folder / name).read_text()}</script>" for name in SCRIPTS)
