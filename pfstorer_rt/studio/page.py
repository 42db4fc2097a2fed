"""The page: its tabs, and what happens when it opens and closes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from pfstorer_rt.studio import fragments
from pfstorer_rt.studio.compare_tab import CompareTab
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.machine_tab import MachineTab
from pfstorer_rt.studio.people_tab import PeopleTab
from pfstorer_rt.studio.restore_tab import QUIET, RestoreTab
from pfstorer_rt.studio.workspace import Workspace


def build_page(workspace: Workspace, engines: Engines) -> Any:
    """Return the page as Gradio blocks."""
    with gr.Blocks(title="PFStorer studio", analytics_enabled=False) as page:
        gr.HTML(fragments.HEAD)
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Restore", id="restore"):
                restore = RestoreTab(workspace, engines)
            with gr.Tab("People", id="people"):
                people = PeopleTab(workspace, engines, restore.person)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(workspace)
            with gr.Tab("Machine", id="machine") as machine_tab:
                machine = MachineTab(workspace, engines)
        gr.HTML(fragments.FOOT)
        page.load(people.refreshed, None, [people.table, people.chosen, people.person], **QUIET)
        machine_tab.select(machine.refreshed, None, machine.lists, **QUIET)
        page.load(compare.listed, None, [compare.studies], **QUIET)

        def close(request: gr.Request) -> None:
            workspace.close(request.session_hash)

        page.unload(close)
    return page
