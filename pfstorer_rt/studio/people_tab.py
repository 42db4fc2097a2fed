"""The tab of people: layout and handlers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pfstorer_rt.imaging.formats import image_suffixes
from pfstorer_rt.progress import CancelledError
from pfstorer_rt.studio import fragments, people
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.handling import Updates, follow, handled
from pfstorer_rt.studio.restore_tab import HEAVY, QUIET, WAIT
from pfstorer_rt.studio.workspace import Session, Workspace

LEAD = "Learn a person once from 1 to 10 good photographs; 3 to 5 are best. Sharp faces from different days help most."
EXPORT = "An identity file takes the person to another machine, where it is imported."
NOTHING = "The photographs appear here, cropped to the face."


class PeopleTab:
    """The components of the tab, and their handlers. `person` is the choice of the tab that restores."""

    def __init__(self, workspace: Workspace, engines: Engines, person: Any) -> None:
        self.workspace, self.engines, self.person = workspace, engines, person
        gr.HTML(f'<p class="studio-lead">{LEAD}</p>')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._learning()
            with gr.Column(scale=3, min_width=320):
                self.line = gr.HTML("", elem_id="people-status")
                self.crops = gr.HTML(fragments.empty(NOTHING), elem_id="crops")
                self.preview = gr.HTML("", elem_id="preview")
        gr.HTML('<h2 class="studio">People on this machine</h2>')
        self.known_line = gr.HTML("", elem_id="known-status")
        self.table = gr.HTML("", elem_id="known")
        self._managing()
        self._wire()

    def _learning(self) -> None:
        self.photographs = gr.File(
            label="Photographs of one person", file_count="multiple", file_types=list(image_suffixes()), height=150,
            elem_id="photographs",
        )  # fmt: skip
        self.name = gr.Textbox(label="Name", info="Letters a-z, digits, '_', '-' or '.'", max_lines=1, elem_id="name")
        self.length = gr.Radio(list(people.LENGTHS), value="Usual", label="Length of the training")
        self.consent = gr.Checkbox(label=people.CONSENT, value=False, elem_id="consent")
        with gr.Row():
            self.learn = gr.Button("Learn this person", variant="primary", elem_id="learn")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-learn")

    def _managing(self) -> None:
        self.chosen = gr.Dropdown(label="Chosen person", filterable=False, elem_id="chosen")
        with gr.Row():
            with gr.Column(min_width=220):
                self.new_name = gr.Textbox(label="New name", max_lines=1, elem_id="new-name")
                self.rename = gr.Button("Rename", size="sm")
            with gr.Column(min_width=220):
                self.confirmation = gr.Textbox(label="To delete: type the name", max_lines=1, elem_id="confirmation")
                self.delete = gr.Button("Delete for good", variant="stop", size="sm", elem_id="delete")
            with gr.Column(min_width=220):
                gr.HTML(f'<p class="studio-lead">{EXPORT}</p>')
                self.export = gr.Button("Export the chosen person", size="sm", elem_id="export")
                self.link = gr.HTML("", elem_id="export-link")
        self.file = gr.File(label="Import an identity file", file_types=[".safetensors"], height=150, elem_id="import")

    def _wire(self) -> None:
        outputs = [
            self.line, self.crops, self.preview, self.table, self.chosen, self.person, self.cancel, self.learn,
        ]  # fmt: skip
        lists = [
            self.known_line, self.table, self.chosen, self.person, self.confirmation, self.new_name, self.link,
            self.file,
        ]  # fmt: skip
        guarded, managed = handled(self.workspace, self.line, self.stopped), handled(self.workspace, self.known_line)
        importing = handled(self.workspace, self.known_line, lambda: {self.file: None})
        self.photographs.change(guarded(self.on_photographs), [self.photographs], outputs, **HEAVY)
        self.learn.click(self.on_wait, None, self.line, queue=False, **QUIET)
        self.learn.click(guarded(self.on_learn), [self.name, self.length, self.consent], outputs, **HEAVY)
        self.rename.click(managed(self.on_rename), [self.chosen, self.new_name], lists, **HEAVY)
        self.delete.click(managed(self.on_delete), [self.chosen, self.confirmation], lists, **HEAVY)
        self.export.click(managed(self.on_export), [self.chosen], lists, **QUIET)
        self.file.upload(importing(self.on_import), [self.file], lists, **QUIET)
        self.cancel.click(self.on_cancel, None, None, queue=False, **QUIET)

    def on_wait(self) -> str:
        """Return a line for a call that has to wait."""
        return fragments.status(WAIT) if self.workspace.is_busy() else ""

    def stopped(self) -> Updates:
        """Return updates of the buttons at the end of every call."""
        return {self.cancel: gr.update(interactive=False), self.learn: gr.update(interactive=True)}

    def session(self, request: gr.Request) -> Session:
        """Return the state of the page that sent a request."""
        return self.workspace.session(request.session_hash)

    def refreshed(self, chosen: str | None = None) -> Updates:
        """Return updates of everything that lists people. chosen: the person to select."""
        known = people.known_people(self.engines)
        names, choices = [person.name for person in known], self.engines.choices()
        selected = chosen if chosen in names else (names[0] if names else None)
        values = [value for _, value in choices]
        person = f"identity:{chosen}" if f"identity:{chosen}" in values else values[0]
        return {
            self.table: fragments.people(known),
            self.chosen: gr.update(choices=names, value=selected),
            self.person: gr.update(choices=choices, value=person),
        }

    def on_photographs(self, files: list[str] | None, request: gr.Request) -> Iterator[Updates]:
        """Show which photographs are used."""
        session = self.session(request)
        if not files:
            yield {self.crops: fragments.empty(NOTHING), self.line: ""}
            return
        judged = yield from follow(
            session,
            lambda report: people.judge_photographs(self.workspace, session, self.engines, files, report),
            lambda state: {self.line: fragments.progress(state)},
        )
        used = sum(not one.reason for one in judged)
        more = "" if used >= 3 else " 3 to 5 give a better likeness."
        text = f"{used} of {len(judged)} photograph{'s are' if len(judged) > 1 else ' is'} used.{more}"
        yield {self.crops: fragments.photographs(judged), self.line: fragments.status(text)}

    def on_learn(self, name: str, length: str, consent: bool, request: gr.Request) -> Iterator[Updates]:
        """Learn the person."""
        session = self.session(request)
        yield {self.cancel: gr.update(interactive=True), self.learn: gr.update(interactive=False)}
        wanted = people.Learning(name, consent, length)
        try:
            identity, notes = yield from follow(
                session,
                lambda report: people.learn(self.workspace, session, self.engines, wanted, report),
                lambda state: {self.line: fragments.progress(state), **self.previewed(state.extra)},
            )
        except CancelledError:
            yield self.refreshed()  # lists the training that can be resumed
            raise
        yield self.refreshed(identity.name)
        failure = yield from follow(
            session,
            lambda report: self.engines.prepare(f"identity:{identity.name}", report),
            lambda state: {self.line: fragments.progress(state)},
        )
        text = f"{identity.name} is learned. Choose {identity.name} in the tab Restore."
        notes = [note for note in [*notes, failure] if note and "left out" not in note]
        yield {self.line: fragments.status(self.workspace.without_folders(" ".join([text, *notes])))}

    def previewed(self, addresses: list[str] | None) -> Updates:
        """Return the update of the preview."""
        return {self.preview: fragments.preview(addresses)} if addresses else {}

    def on_rename(self, chosen: str | None, new: str) -> Iterator[Updates]:
        """Rename the chosen person."""
        text = people.rename(chosen, new)
        yield {self.known_line: fragments.status(text), self.new_name: "", **self.refreshed(new.strip())}

    def on_delete(self, chosen: str | None, confirmation: str) -> Iterator[Updates]:
        """Delete the chosen person."""
        text = people.delete(chosen, confirmation)
        self.engines.close()
        shown = {self.known_line: fragments.status(text), self.confirmation: "", self.link: ""}
        yield {**shown, **self.refreshed()}

    def on_export(self, chosen: str | None, request: gr.Request) -> Iterator[Updates]:
        """Offer the file of the chosen person."""
        address = people.export_file(self.workspace, self.session(request), chosen)
        yield {self.link: fragments.download(address, f"Save {chosen}.safetensors"), self.known_line: ""}

    def on_import(self, file: str | None, request: gr.Request) -> Iterator[Updates]:
        """Store an identity file."""
        text = people.import_file(self.workspace, self.session(request), file)
        yield {self.known_line: fragments.status(text), **self.refreshed()}

    def on_cancel(self, request: gr.Request) -> None:
        """Cancel the training."""
        self.session(request).cancel()
