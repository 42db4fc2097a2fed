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
from pfstorer_rt.studio.work import State
from pfstorer_rt.studio.workspace import Session, Workspace

LEAD = "Drop the pictures to restore and choose the person in them. Move the strength until the likeness is right."
NOTHING = "The restored picture appears here, beside the original."
COMPARED = (
    "Each result is compared with these photographs. Without them, it is compared with what was learned about the "
    "person. They are forgotten when you close this page."
)
WAIT = "Another task of the studio is running. This one starts after it."
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
HEAVY: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "work", **QUIET}


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
            label="Person", info="Learn people in the tab People.", elem_id="person", filterable=False
        )
        self.strength = gr.Slider(
            0, 1.5, 1.0, step=0.05, label="Strength of the person", elem_id="strength", interactive=False,
            info="0: without the person. 1: as learned. A new value restores the shown picture again.",
        )  # fmt: skip
        with gr.Accordion("Likeness: photographs of the person", open=False):
            self.references = gr.File(
                label="Good photographs of the person", file_count="multiple", file_types=kinds, height=150
            )
            gr.HTML(f'<p class="studio-lead">{COMPARED}</p>')
        with gr.Accordion("More", open=False):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            self.steps = gr.Number(
                0,
                label="Diffusion steps",
                info="0: the usual number",
                precision=0,
                minimum=0,
                maximum=1000,
            )
            self.scale = gr.Slider(1, 4, 1, step=0.5, label="Size of the result, relative to the input")
            self.scratches = gr.Checkbox(label="Remove scratches and dust first", elem_id="scratches")
        with gr.Row():
            self.restore = gr.Button("Restore", variant="primary", elem_id="restore")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-restore")

    def _outputs(self) -> None:
        self.line = gr.HTML("", elem_id="restore-status")
        self.viewer = gr.HTML(fragments.empty(NOTHING), elem_id="viewer")
        self.reading = gr.HTML("", elem_id="reading")
        with gr.Column(visible=False) as self.several:
            self.shown = gr.Dropdown([], label="Shown picture", filterable=False, elem_id="shown")
            with gr.Row():
                self.back = gr.Button("Previous picture", size="sm")
                self.next = gr.Button("Next picture", size="sm", elem_id="next-shown")
        self.results = gr.HTML("", elem_id="results")
        self.zip = gr.HTML("", elem_id="zip")
        self.faces = gr.HTML("", elem_id="faces")

    def _wire(self) -> None:
        outputs = [
            self.line, self.viewer, self.shown, self.several, self.reading, self.results, self.zip, self.faces,
            self.cancel, self.restore, self.strength,
        ]  # fmt: skip
        dials = [self.person, self.strength, self.seed, self.steps, self.scale, self.scratches]
        guarded, browsing = handled(self.workspace, self.line, self.stopped), handled(self.workspace, self.line)
        self.folder.upload(self.on_folder, [self.files, self.folder], self.files, **QUIET)
        self.files.change(self.on_cancel, None, None, queue=False, **QUIET)
        self.files.change(guarded(self.on_pictures), [self.files, self.person], outputs, **HEAVY)
        self.person.change(guarded(self.on_person), [self.person], outputs, **HEAVY)
        self.references.change(guarded(self.on_references), [self.references, self.person], outputs, **HEAVY)
        self.restore.click(self.on_wait, None, self.line, queue=False, **QUIET)
        self.restore.click(guarded(self.on_restore), dials, outputs, **HEAVY)
        self.strength.release(
            guarded(self.on_strength), [self.shown, *dials], outputs, trigger_mode="always_last", **HEAVY
        )
        self.shown.input(browsing(self.on_shown), [self.shown], outputs, **QUIET)
        self.back.click(browsing(self.on_back), [self.shown], outputs, **QUIET)
        self.next.click(browsing(self.on_next), [self.shown], outputs, **QUIET)
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

    def on_wait(self) -> str:
        """Return a line for a call that has to wait."""
        return fragments.status(WAIT) if self.workspace.is_busy() else ""

    def on_pictures(self, files: list[str] | None, person: str, request: gr.Request) -> Iterator[Updates]:
        """Take the dropped pictures and find their faces."""
        session = self.session(request)
        yield {
            **dict.fromkeys((self.line, self.reading, self.results, self.zip, self.faces), ""),
            self.viewer: fragments.empty(NOTHING),
            self.several: gr.update(visible=False),
        }
        paths, refused = restoring.take_pictures(self.workspace, session, files or [])
        if paths:
            yield from self.show_or_input(session, paths[0])
            yield from self.find_faces(session, person)
        if refused:
            yield {self.line: fragments.status(self.workspace.without_folders(" ".join(refused)), error=True)}

    def find_faces(self, session: Session, person: str) -> Iterator[Updates]:
        """Show the faces of the pictures."""
        found = yield from follow(
            session,
            lambda report: restoring.find_faces(self.workspace, session, self.engines, person or NOBODY, report),
            lambda state: {self.line: fragments.progress(state)},
        )
        yield {self.line: "", self.faces: fragments.faces(found, len(session.inputs))}

    def on_person(self, person: str, request: gr.Request) -> Iterator[Updates]:
        """Find the face of another person."""
        session = self.session(request)
        yield {self.strength: gr.update(interactive=person != NOBODY)}
        if session.inputs:
            yield from self.find_faces(session, person)

    def on_references(self, files: list[str] | None, person: str, request: gr.Request) -> Iterator[Updates]:
        """Take photographs of the person, compare the results again, and find the person's face in the pictures."""
        session = self.session(request)
        yield {self.line: fragments.status("reading the photographs")}
        try:
            text = restoring.take_references(self.workspace, session, files or [])
        except Exception:  # the photographs before are forgotten all the same
            yield from self.compare_again(session)
            raise
        yield from self.compare_again(session)
        if session.inputs:
            yield from self.find_faces(session, person)
        yield {self.line: fragments.status(text)}

    def compare_again(self, session: Session) -> Iterator[Updates]:
        """Measure the likeness of all results again, and show it."""
        try:
            yield from follow(
                session,
                lambda report: restoring.compare_results(self.workspace, session, self.engines, report),
                lambda state: {self.line: fragments.progress(state)},
            )
        except Exception:  # also a cancellation: a likeness that was measured before is not shown any more
            yield from self.finish(session, None)
            raise
        yield from self.finish(session, None)

    def on_restore(
        self,
        person: str,
        strength: float,
        seed: float,
        steps: float,
        scale: float,
        scratches: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Restore all pictures."""
        dials = restoring.Dials(strength, seed, steps, scale, scratches)
        yield from self.restore_some(self.session(request), person, dials, None)

    def on_strength(
        self,
        shown: str | None,
        person: str,
        strength: float,
        seed: float,
        steps: float,
        scale: float,
        scratches: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Restore the shown picture again."""
        session = self.session(request)
        only = next((path for path in session.inputs if path.name == shown and path in session.outcomes), None)
        if only is not None:
            dials = restoring.Dials(strength, seed, steps, scale, scratches)
            yield from self.restore_some(session, person, dials, only)

    def restore_some(
        self, session: Session, person: str, dials: restoring.Dials, only: Path | None
    ) -> Iterator[Updates]:
        """Restore all pictures or one; show each result in the table, and the first one in the viewer."""
        yield {self.cancel: gr.update(interactive=True), self.restore: gr.update(interactive=False)}
        if only is None:
            session.outcomes = {}

        finished = len(session.outcomes)

        def show(state: State) -> Updates:
            nonlocal finished
            grown, finished = len(session.outcomes) > finished, len(session.outcomes)
            return {self.line: fragments.progress(state), **({self.results: self.table(session)} if grown else {})}

        try:
            outcomes = yield from follow(
                session,
                lambda report: restoring.restore(
                    self.workspace, session, self.engines, person or NOBODY, dials, report, only
                ),
                show,
            )
        except Exception:  # also a cancellation: what was finished is shown
            yield from self.finish(session, only)
            raise
        yield from self.finish(session, only)
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        text = f"{len(failed)} of {len(outcomes)} pictures failed; the table has the reasons." if failed else ""
        yield {self.line: fragments.status(text, error=True)}

    def finish(self, session: Session, only: Path | None) -> Iterator[Updates]:
        """Show a picture and all results after a call."""
        first = only or next(iter(session.outcomes), None)
        if first is not None:
            yield from self.show_or_input(session, first)
        yield self.all_results(session)

    def table(self, session: Session) -> str:
        """Return the table of the results."""
        outcomes = [session.outcomes[path] for path in session.inputs if path in session.outcomes]
        return self.workspace.without_folders(fragments.results([(one, self.address(one)) for one in outcomes]))

    def all_results(self, session: Session) -> Updates:
        """Return the table of the results and the link to all of them."""
        several = sum(outcome.status == "done" for outcome in session.outcomes.values())
        link = "Download all, with report (zip)" if several > 1 else "Download with report (zip)"
        packed = fragments.download(restoring.package(self.workspace, session), link) if several else ""
        return {self.results: self.table(session), self.zip: packed}

    def address(self, outcome: Outcome) -> str:
        """Return the address of a result; empty without one."""
        done = outcome.status == "done" and outcome.job.target is not None
        return self.workspace.publish(outcome.job.target) if done and outcome.job.target else ""

    def show_or_input(self, session: Session, path: Path) -> Iterator[Updates]:
        """Show a picture with its result, or the picture alone where it has none."""
        names = [each.name for each in session.inputs]
        choice = {
            self.shown: gr.update(choices=names, value=path.name),
            self.several: gr.update(visible=len(names) > 1),
        }
        outcome = session.outcomes.get(path)
        if outcome is None or outcome.status != "done":
            address = restoring.shown(self.workspace, session, path)
            yield {self.viewer: fragments.viewer([(address, path.name)]), self.reading: "", **choice}
            return
        before, after = restoring.before_and_after(self.workspace, session, path)
        found = fragments.reading(restoring.likeness(outcome), session.references is not None)
        yield {self.viewer: fragments.viewer([(before, "Before"), (after, "After")]), self.reading: found, **choice}

    def on_shown(self, name: str | None, request: gr.Request) -> Iterator[Updates]:
        """Show the chosen picture."""
        yield from self.step(name, 0, request)

    def on_back(self, name: str | None, request: gr.Request) -> Iterator[Updates]:
        """Show the picture before."""
        yield from self.step(name, -1, request)

    def on_next(self, name: str | None, request: gr.Request) -> Iterator[Updates]:
        """Show the next picture."""
        yield from self.step(name, 1, request)

    def step(self, name: str | None, by: int, request: gr.Request) -> Iterator[Updates]:
        """Show the picture that many places further on."""
        session = self.session(request)
        names = [path.name for path in session.inputs]
        if name in names:
            yield from self.show_or_input(session, session.inputs[(names.index(name) + by) % len(names)])

    def on_cancel(self, request: gr.Request) -> None:
        """Cancel the running call."""
        self.session(request).cancel()
