"""The tab that restores: layout and handlers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from pfstorer_rt.imaging.formats import image_suffixes
from pfstorer_rt.runtime.batch import Outcome
from pfstorer_rt.studio import fragments, restoring
from pfstorer_rt.studio.engines import NOBODY, Engines
from pfstorer_rt.studio.handling import Updates, follow, handled
from pfstorer_rt.studio.workspace import Session, Workspace

LEAD = "Drop the pictures to restore and choose the person in them. Move the strength until the likeness is right."
NOTHING = "The restored picture appears here, beside the original."
HEAVY: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "work", "show_progress": "hidden"}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class RestoreTab:
    """The components of the tab, and their handlers."""

    def __init__(self, workspace: Workspace, engines: Engines) -> None:
        self.workspace, self.engines = workspace, engines
        gr.HTML(f'<p class="studio-lead">{LEAD}</p>')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._inputs()
            with gr.Column(scale=3, min_width=320):
                self._outputs()
        self._wire()

    def _inputs(self) -> None:
        kinds = list(image_suffixes())
        self.files = gr.File(
            label="Pictures to restore", file_count="multiple", file_types=kinds, height=150, elem_id="pictures"
        )
        self.folder = gr.UploadButton("Add a folder of pictures", file_count="directory", size="sm", elem_id="folder")
        self.person = gr.Dropdown(
            label="Person", info="Learn more people in the tab People.", elem_id="person", filterable=False
        )
        self.strength = gr.Slider(
            0, 1.5, 1.0, step=0.05, label="Strength of the identity", elem_id="strength",
            info="0: the base alone. 1: as learned. A new value restores the shown picture again.",
        )  # fmt: skip
        with gr.Accordion("Likeness: photographs of the person", open=False):
            self.references = gr.File(
                label="Good photographs of the person", file_count="multiple", file_types=kinds, height=120
            )
            gr.HTML("They are compared with each result, and forgotten when you close this page.")
        with gr.Accordion("More", open=False):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            self.steps = gr.Number(
                0,
                label="Diffusion steps",
                info="0: the default of the base or plan",
                precision=0,
                minimum=0,
                maximum=1000,
            )
            self.scale = gr.Slider(1, 4, 1, step=0.5, label="Size of the result, relative to the input")
        with gr.Row():
            self.restore = gr.Button("Restore", variant="primary", elem_id="restore")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-restore")

    def _outputs(self) -> None:
        self.line = gr.HTML("", elem_id="restore-status")
        self.viewer = gr.HTML(fragments.empty(NOTHING), elem_id="viewer")
        self.shown = gr.Radio([], label="Shown picture", visible=False, elem_id="shown")
        self.reading = gr.HTML("")
        self.results = gr.HTML("", elem_id="results")
        self.zip = gr.HTML("", elem_id="zip")
        self.faces = gr.HTML("", elem_id="faces")

    def _wire(self) -> None:
        outputs = [
            self.line, self.viewer, self.shown, self.reading, self.results, self.zip, self.faces, self.cancel,
            self.restore,
        ]  # fmt: skip
        dials = [self.person, self.strength, self.seed, self.steps, self.scale]
        guarded = handled(self.line, self.stopped)
        self.folder.upload(self.on_folder, [self.files, self.folder], self.files, **QUIET)
        self.files.change(guarded(self.on_pictures), [self.files], outputs, **HEAVY, api_visibility="private")
        self.references.change(
            guarded(self.on_references), [self.references], outputs, **HEAVY, api_visibility="private"
        )
        self.restore.click(guarded(self.on_restore), dials, outputs, **HEAVY, api_visibility="private")
        self.strength.release(
            guarded(self.on_strength), [self.shown, *dials], outputs, **HEAVY, api_visibility="private"
        )
        self.shown.select(guarded(self.on_shown), [self.shown], outputs, **QUIET)
        self.cancel.click(self.on_cancel, None, None, queue=False, **QUIET)

    def stopped(self) -> Updates:
        """Return updates of the buttons at the end of every call."""
        return {self.cancel: gr.update(interactive=False), self.restore: gr.update(interactive=True)}

    def session(self, request: gr.Request) -> Session:
        """Return the state of the page that sent a request."""
        return self.workspace.session(request.session_hash)

    def on_folder(self, files: list[str] | None, folder: list[str] | None) -> list[str]:
        """Add the pictures of a folder."""
        suffixes = image_suffixes()
        return [*(files or []), *(file for file in folder or [] if Path(file).suffix.lower() in suffixes)]

    def on_pictures(self, files: list[str] | None, request: gr.Request) -> Iterator[Updates]:
        """Take the dropped pictures and find their faces."""
        session = self.session(request)
        session.cancel()
        yield {
            **dict.fromkeys((self.line, self.reading, self.results, self.zip, self.faces), ""),
            self.viewer: fragments.empty(NOTHING),
            self.shown: gr.update(choices=[], value=None, visible=False),
        }
        paths = restoring.take_pictures(self.workspace, session, files or [])
        if paths:
            address = restoring.shown(self.workspace, session, paths[0])
            yield {self.viewer: fragments.viewer([(address, paths[0].name)]), **self.choose(session, paths[0])}
            yield from self.find_faces(session)

    def find_faces(self, session: Session) -> Iterator[Updates]:
        """Show the faces of the pictures."""
        found = yield from follow(
            session,
            lambda report: restoring.find_faces(self.workspace, session, report),
            lambda state: {self.line: fragments.progress(state)},
        )
        yield {self.line: "", self.faces: fragments.faces(found)}

    def on_references(self, files: list[str] | None, request: gr.Request) -> Iterator[Updates]:
        """Take photographs of the person, and find the person's face in the pictures."""
        session = self.session(request)
        yield {self.line: fragments.status("reading the photographs")}
        text = restoring.take_references(self.workspace, session, files or [])
        yield from self.find_faces(session) if session.inputs else ()
        yield {self.line: fragments.status(text)}

    def on_restore(
        self, person: str, strength: float, seed: float, steps: float, scale: float, request: gr.Request
    ) -> Iterator[Updates]:
        """Restore all pictures."""
        dials = restoring.Dials(strength, int(seed or 0), int(steps or 0), scale)
        yield from self.restore_some(self.session(request), person, dials, None)

    def on_strength(
        self,
        shown: str | None,
        person: str,
        strength: float,
        seed: float,
        steps: float,
        scale: float,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Restore the shown picture again."""
        session = self.session(request)
        only = next((path for path in session.inputs if path.name == shown and path in session.outcomes), None)
        if only is not None:
            dials = restoring.Dials(strength, int(seed or 0), int(steps or 0), scale)
            yield from self.restore_some(session, person, dials, only)

    def restore_some(
        self, session: Session, person: str, dials: restoring.Dials, only: Path | None
    ) -> Iterator[Updates]:
        """Restore all pictures or one, and show the first of them."""
        yield {self.cancel: gr.update(interactive=True), self.restore: gr.update(interactive=False)}
        outcomes = yield from follow(
            session,
            lambda report: restoring.restore(
                self.workspace, session, self.engines, person or NOBODY, dials, report, only
            ),
            lambda state: {self.line: fragments.progress(state)},
        )
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        text = f"{len(failed)} of {len(outcomes)} pictures failed; the table has the reasons." if failed else ""
        yield {self.line: fragments.status(text, error=True), **self.all_results(session)}
        done = [outcome for outcome in outcomes if outcome.status == "done" and outcome.job.source is not None]
        if done and done[0].job.source is not None:
            yield self.show(session, done[0].job.source)

    def all_results(self, session: Session) -> Updates:
        """Return the table of the results and the link to all of them."""
        outcomes = [session.outcomes[path] for path in session.inputs if path in session.outcomes]
        entries = [(outcome, self.address(outcome)) for outcome in outcomes]
        several = sum(outcome.status == "done" for outcome in outcomes)
        link = "Download all, with report (zip)" if several > 1 else "Download with report (zip)"
        packed = fragments.download(restoring.package(self.workspace, session), link) if several else ""
        return {self.results: fragments.results(entries), self.zip: packed}

    def address(self, outcome: Outcome) -> str:
        """Return the address of a result; empty without one."""
        done = outcome.status == "done" and outcome.job.target is not None
        return self.workspace.publish(outcome.job.target) if done and outcome.job.target else ""

    def choose(self, session: Session, path: Path) -> Updates:
        """Return the update of the choice of the shown picture."""
        names = [each.name for each in session.inputs]
        return {self.shown: gr.update(choices=names, value=path.name, visible=len(names) > 1)}

    def show(self, session: Session, path: Path) -> Updates:
        """Return updates that show a picture and its result."""
        before, after = restoring.before_and_after(self.workspace, session, path)
        return {
            self.viewer: fragments.viewer([(before, "Before"), (after, "After")]),
            self.reading: fragments.reading(restoring.likeness(session.outcomes[path])),
            **self.choose(session, path),
        }

    def on_shown(self, name: str, request: gr.Request) -> Iterator[Updates]:
        """Show the chosen picture."""
        session = self.session(request)
        path = next((path for path in session.inputs if path.name == name), None)
        if path is not None and path not in session.outcomes:
            address = restoring.shown(self.workspace, session, path)
            yield {self.viewer: fragments.viewer([(address, path.name)]), self.reading: ""}
        elif path is not None:
            yield self.show(session, path)

    def on_cancel(self, request: gr.Request) -> None:
        """Cancel the running call."""
        self.session(request).cancel()
