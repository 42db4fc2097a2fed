"""The pages of a user study, for raters: plain HTML forms, without the names of the methods."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import is_name
from pfstorer_rt.study import QUESTIONS, Study, Trial, open_study, record_vote, trials

RATER = "pfstorer_rater"
"""Cookie with the random name of a rater."""
LETTERS = "ABCDEFGH"
FOLDER = Path(__file__).parent


def add_study_pages(app: FastAPI) -> None:
    """Add the pages of all studies to an application."""
    app.get("/study/{code}/", response_class=HTMLResponse)(start)
    app.get("/study/{code}/{number:int}", response_class=HTMLResponse)(ask)
    app.post("/study/{code}/{number:int}")(answer)
    app.get("/study/{code}/{number:int}/{slot:int}.png")(picture)
    app.get("/study/{code}/reference/{number:int}.png")(reference)
    app.exception_handler(PFStorerError)(refuse)


def refuse(request: Request, error: Exception) -> Response:
    """Answer an unknown study or a wrong vote in one line."""
    return PlainTextResponse(str(error), 404)


def start(code: str, request: Request) -> Response:
    """Welcome a rater, who gets a random name."""
    study = open_study(code)
    count = len(study.pictures)
    body = (
        f"<h1>Which picture is better?</h1><p>You will see {count} picture{'s, each' if count > 1 else ''} in "
        f"{len(study.methods)} versions. Answer two questions about each picture. All versions zoom together. "
        f"Your answers are stored under a random name.</p><a class='go' href='0'>Start</a>"
    )
    answer = html(body)
    if not rater_of(request):
        answer.set_cookie(RATER, secrets.token_hex(8), httponly=True, samesite="strict", path=f"/study/{code}/")
    return answer


def ask(code: str, number: int, request: Request) -> Response:
    """Show one picture in all versions, with the questions."""
    study, rater = open_study(code), rater_of(request)
    if rater is None:
        return RedirectResponse(".", 303)
    if number >= len(study.pictures):
        return html("<h1>Thank you</h1><p>All your answers are stored. You can close this page.</p>")
    return html(form(study, trials(study, rater)[number], number))


def answer(
    code: str, number: int, request: Request, quality: str = Form(max_length=1), identity: str = Form(max_length=1)
) -> Response:
    """Store the answers to one picture."""
    study, rater = open_study(code), rater_of(request)
    if rater is None or number >= len(study.pictures):
        return RedirectResponse(f"/study/{code}/", 303)
    trial = trials(study, rater)[number]
    for question, letter in (("quality", quality), ("identity", identity)):
        slot = LETTERS.find(letter)
        if not letter or not 0 <= slot < len(trial.shown):
            return PlainTextResponse("Choose a picture for both questions.", 400)
        record_vote(study, rater, trial, question, trial.shown[slot])
    return RedirectResponse(f"/study/{code}/{number + 1}", 303)


def picture(code: str, number: int, slot: int, request: Request) -> Response:
    """Return a version of a picture; its address does not name the method."""
    study, rater = open_study(code), rater_of(request)
    if rater is None or number >= len(study.pictures) or slot >= len(study.methods):
        return PlainTextResponse("Not found.", 404)
    trial = trials(study, rater)[number]
    return image(study.picture(trial.shown[slot], trial.picture))


def reference(code: str, number: int) -> Response:
    """Return a photograph of the person."""
    study = open_study(code)
    return image(study.reference(number)) if number < study.references else PlainTextResponse("Not found.", 404)


def form(study: Study, trial: Trial, number: int) -> str:
    """Return the pictures and the questions of one trial."""
    letters = LETTERS[: len(trial.shown)]
    entries = [{"url": f"{number}/{slot}.png", "label": letter} for slot, letter in enumerate(letters)]
    viewer = f'<pf-viewer mode="side" pictures="{escape(json.dumps(entries))}"></pf-viewer>'
    questions = "".join(question(name, text, letters) for name, text in QUESTIONS.items())
    known = "".join(
        f'<img src="reference/{i}.png" alt="Photograph {i + 1} of the person">' for i in range(study.references)
    )
    person = f"<h2>The person</h2><div class='row'>{known}</div>" if known else ""
    return (
        f"<h1>Picture {number + 1} of {len(study.pictures)}</h1>{viewer}{person}"
        f"<form method='post' action='{number}'>{questions}<button class='go'>Next</button></form>"
    )


def question(name: str, text: str, letters: Sequence[str]) -> str:
    """Return one question, with a choice for every version."""
    choices = "".join(
        f'<label><input type="radio" name="{name}" value="{letter}" required> {letter}</label>' for letter in letters
    )
    return f"<fieldset><legend>{escape(text)}</legend>{choices}</fieldset>"


def rater_of(request: Request) -> str | None:
    """Return the random name of the rater, None before the start page was opened."""
    name = request.cookies.get(RATER)
    return name if name and is_name(name) else None


def html(body: str) -> HTMLResponse:
    """Return a page."""
    template, script = (FOLDER / "study.html").read_text(), (FOLDER / "viewer.js").read_text()
    text = template.replace("<!-- script -->", f"<script>{script}</script>").replace("<!-- body -->", body)
    return HTMLResponse(text, headers={"cache-control": "no-store"})


def image(path: Path) -> Any:
    """Return the file of a picture."""
    return FileResponse(path, headers={"cache-control": "private, no-store"})
