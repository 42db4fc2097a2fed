"""The tab that compares folders, and makes user studies: layout and handlers."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from pfstorer_rt import study
from pfstorer_rt.imaging.formats import image_suffixes
from pfstorer_rt.studio import comparing, fragments
from pfstorer_rt.studio.handling import Updates, handled
from pfstorer_rt.studio.restore_tab import QUIET
from pfstorer_rt.studio.workspace import Session, Workspace

Files = list[str] | None
LEAD = (
    "Drop two to four folders of results, for example of other methods. Pictures of the same name stand side by side."
)
STUDY = (
    "A study shows the compared pictures to other people, without names and in random order, and asks two questions. "
    "Send them the link. They see the study only."
)


class CompareTab:
    """The components of the tab, and their handlers."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        gr.HTML(f'<p class="studio-lead">{LEAD}</p>')
        kinds = list(image_suffixes())
        self.names, self.folders = [], []
        with gr.Row():
            for number in range(comparing.SLOTS):
                with gr.Column(min_width=220):
                    letter = "ABCD"[number]
                    self.names.append(
                        gr.Textbox(label=f"Name of folder {letter}", max_lines=1, elem_id=f"method-{letter}")
                    )
                    self.folders.append(
                        gr.File(
                            label=f"Pictures of folder {letter}",
                            file_count="multiple",
                            file_types=kinds,
                            height=150,
                            elem_id=f"folder-{letter}",
                        )
                    )
        self.compare = gr.Button("Compare", variant="primary", elem_id="compare")
        self.line = gr.HTML("", elem_id="compare-status")
        self.picture = gr.Dropdown(label="Picture", filterable=False, visible=False, elem_id="compared")
        with gr.Row(visible=False) as self.steps:
            self.back = gr.Button("Previous picture", size="sm")
            self.next = gr.Button("Next picture", size="sm", elem_id="next")
        self.viewer = gr.HTML(fragments.empty("The pictures appear here, with one zoom for all."), elem_id="sides")
        self._study(kinds)
        self._wire()

    def _study(self, kinds: list[str]) -> None:
        gr.HTML(f'<h2 class="studio">User study</h2><p class="studio-lead">{STUDY}</p>')
        with gr.Row():
            with gr.Column(min_width=260):
                self.references = gr.File(
                    label="Photographs of the person, for the raters",
                    file_count="multiple",
                    file_types=kinds,
                    height=150,
                )
                self.create = gr.Button("Make a study of these folders", elem_id="create-study")
            with gr.Column(min_width=260):
                self.studies = gr.Dropdown(label="Study", filterable=False, elem_id="studies")
                with gr.Row():
                    self.show = gr.Button("Show the results", size="sm", elem_id="show-study")
                    self.delete = gr.Button("Delete the study", size="sm", variant="stop")
        self.study_line = gr.HTML("", elem_id="study-status")
        self.results = gr.HTML("", elem_id="study-results")

    def _wire(self) -> None:
        outputs = [self.line, self.picture, self.steps, self.viewer]
        studies = [self.study_line, self.studies, self.results]
        guarded, studying = handled(self.workspace, self.line), handled(self.workspace, self.study_line)
        self.compare.click(guarded(self.on_compare), [*self.names, *self.folders], outputs, **QUIET)
        self.picture.input(guarded(self.on_picture), [self.picture], outputs, **QUIET)
        self.back.click(guarded(self.on_back), [self.picture], outputs, **QUIET)
        self.next.click(guarded(self.on_next), [self.picture], outputs, **QUIET)
        self.create.click(studying(self.on_create), [self.references], studies, **QUIET)
        self.show.click(studying(self.on_show), [self.studies], studies, **QUIET)
        self.delete.click(studying(self.on_delete), [self.studies], studies, **QUIET)

    def session(self, request: gr.Request) -> Session:
        """Return the state of the page that sent a request."""
        return self.workspace.session(request.session_hash)

    def on_compare(
        self, a: str, b: str, c: str, d: str, files_a: Files, files_b: Files, files_c: Files, files_d: Files,
        request: gr.Request,
    ) -> Iterator[Updates]:  # fmt: skip
        """Pair the pictures of the folders, and show the first of them."""
        session = self.session(request)
        given = [(a, files_a or []), (b, files_b or []), (c, files_c or []), (d, files_d or [])]
        session.comparison = found = comparing.take_folders(self.workspace, session, given)
        text = f"{len(found.names)} picture{'s' if len(found.names) > 1 else ''} of {len(found.results)} folders."
        first = found.names[0]
        yield {
            self.line: fragments.status(text),
            self.picture: gr.update(choices=found.names, value=first, visible=True),
            self.steps: gr.update(visible=len(found.names) > 1),
            **self.view(session, first),
        }

    def view(self, session: Session, name: str) -> Updates:
        """Return the update of the viewer."""
        assert session.comparison is not None
        pictures = comparing.side_by_side(self.workspace, session, session.comparison, name)
        return {self.viewer: fragments.viewer(pictures, "side")}

    def on_picture(self, name: str, request: gr.Request) -> Iterator[Updates]:
        """Show the chosen picture."""
        if self.session(request).comparison is not None:
            yield self.view(self.session(request), name)

    def on_back(self, name: str, request: gr.Request) -> Iterator[Updates]:
        """Show the picture before."""
        yield from self.step(name, -1, request)

    def on_next(self, name: str, request: gr.Request) -> Iterator[Updates]:
        """Show the next picture."""
        yield from self.step(name, 1, request)

    def step(self, name: str, by: int, request: gr.Request) -> Iterator[Updates]:
        """Show the picture that many places further on."""
        session = self.session(request)
        if session.comparison is not None:
            names = session.comparison.names
            found = names[(names.index(name) + by) % len(names)]
            yield {self.picture: found, **self.view(session, found)}

    def listed(self, chosen: str | None = None) -> Updates:
        """Return the update of the list of studies."""
        entries = [(f"{each.code}: {', '.join(each.methods)}", each.code) for each in study.list_studies()]
        codes = [code for _, code in entries]
        return {self.studies: gr.update(choices=entries, value=chosen or (codes[0] if codes else None))}

    def on_create(self, references: list[str] | None, request: gr.Request) -> Iterator[Updates]:
        """Make a study of the compared folders."""
        session = self.session(request)
        made = comparing.start_study(self.workspace, session, session.comparison, references or [])
        yield {self.study_line: "", self.results: fragments.study_link(made), **self.listed(made.code)}

    def on_show(self, code: str | None, request: gr.Request) -> Iterator[Updates]:
        """Show the link, the results and the votes of a study."""
        found = study.open_study(comparing.chosen(code))
        votes = comparing.votes_file(self.workspace, self.session(request), found)
        link = fragments.download(votes, "Download the votes (CSV)") if votes else ""
        results = fragments.study_results(found, study.shares(found))
        yield {self.study_line: "", self.results: fragments.study_link(found) + results + link}

    def on_delete(self, code: str | None) -> Iterator[Updates]:
        """Delete a study with its votes."""
        study.delete_study(comparing.chosen(code))
        yield {self.study_line: fragments.status("The study is deleted."), self.results: "", **self.listed()}
