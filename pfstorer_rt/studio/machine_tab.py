"""The tab about this machine: layout and handlers."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from pfstorer_rt.studio import fragments, machine
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.handling import Updates, follow, handled
from pfstorer_rt.studio.restore_tab import HEAVY, QUIET
from pfstorer_rt.studio.workspace import Workspace

LEAD = "Find out what this machine can run, and how fast its plans are."
NOTHING = "The parts that can run on this machine appear here, with advice for the missing ones."
PLANS = "A plan is a person and the base in one file that restores faster. The studio makes one for each person."


class MachineTab:
    """The components of the tab, and their handlers."""

    def __init__(self, workspace: Workspace, engines: Engines) -> None:
        self.workspace, self.engines = workspace, engines
        gr.HTML(f'<p class="studio-lead">{LEAD}</p>')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.examine = gr.Button("Examine this machine", variant="primary", elem_id="examine")
                self.line = gr.HTML("", elem_id="machine-status")
                self.tables = gr.HTML(fragments.empty(NOTHING), elem_id="machine")
            with gr.Column(scale=3, min_width=300):
                gr.HTML(f'<h2 class="studio">Plans</h2><p class="studio-lead">{PLANS}</p>')
                self.listed = gr.HTML("", elem_id="plans")
                self.plan = gr.Dropdown([], label="Plan", filterable=False, elem_id="plan")
                self.time = gr.Button("Time this plan", elem_id="time")
                self.timing = gr.HTML("", elem_id="timing-status")
                self.plot = gr.HTML("", elem_id="plot")
        self.lists = [self.listed, self.plan, self.time]
        examining, timing = handled(self.workspace, self.line), handled(self.workspace, self.timing)
        self.examine.click(examining(self.on_examine), None, [self.line, self.tables], **QUIET)
        self.time.click(timing(self.on_time), [self.plan], [self.timing, self.plot], **HEAVY)

    def refreshed(self) -> Updates:
        """Return updates of everything that lists plans."""
        plans = machine.name_plans(self.engines.plans())
        names = list(plans)
        return {
            self.listed: fragments.table("", machine.describe_plans(plans)),
            self.plan: gr.update(choices=names, value=names[0] if names else None),
            self.time: gr.update(interactive=bool(names)),
        }

    def on_examine(self) -> Iterator[Updates]:
        """Show what this machine can run."""
        yield {self.line: fragments.status("examining this machine")}
        tables = "".join(fragments.table(title, rows) for title, rows in machine.diagnosis())
        yield {self.tables: tables, self.line: ""}

    def on_time(self, name: str | None, request: gr.Request) -> Iterator[Updates]:
        """Time the chosen plan, and show the plot."""
        session = self.workspace.session(request.session_hash)
        address = yield from follow(
            session,
            lambda report: machine.benchmark(self.workspace, session, self.engines.plans(), name, report),
            lambda state: {self.timing: fragments.progress(state)},
        )
        yield {self.timing: "", self.plot: fragments.plot(address, f"Bars of the measured times of {name}")}
