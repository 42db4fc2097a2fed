"""Pieces of HTML of the page. Every text is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from pfstorer_rt.faces.likeness import Likeness
from pfstorer_rt.runtime.batch import Outcome
from pfstorer_rt.studio.people import Judged, Known
from pfstorer_rt.studio.restoring import Found, is_about_likeness, likeness
from pfstorer_rt.studio.work import State, time_left
from pfstorer_rt.study import QUESTIONS, Share, Study

HEAD = """<header class="studio-head"><svg viewBox="0 0 48 48" aria-hidden="true"><rect width="48" height="48" rx="12"
fill="#1b6c5e"/><g fill="none" stroke="#fff" stroke-width="2.5" stroke-linecap="round"><circle cx="24" cy="20" r="8"/>
<path d="M9 42c2-9 8-12 15-12" stroke-dasharray="2 4"/>
<path d="M24 30c7 0 13 3 15 12"/></g></svg><div><h1>PFStorer studio</h1>
<p>Restores old photographs of a person, with the help of good photographs of the same person.</p></div></header>"""
FOOT = """<p class="studio-foot">Everything stays on this machine. Restoration invents detail: a restored face shows a
likeness, and it is not evidence of what the person looked like. Results are marked as made with AI.</p>"""


def status(text: str, error: bool = False) -> str:
    """Return a line about the state of the page; empty without a text."""
    kind = "status error" if error else "status"
    return f'<div class="{kind}" role="{"alert" if error else "status"}">{escape(text)}</div>' if text else ""


def progress(state: State) -> str:
    """Return the line of a running call, with a bar."""
    value = "" if state.share is None else f' value="{state.share:.3f}"'
    left = time_left(state.seconds_left)
    aside = f'<span class="left">{escape(left)}</span>' if left else ""
    return (
        f'<div class="status" role="status">{aside}{escape(state.text)}'
        f'<progress max="1"{value} aria-label="Progress"></progress></div>'
    )


def viewer(pictures: Sequence[tuple[str, str]], mode: str = "slide") -> str:
    """Return the viewer of pictures (address, label)."""
    entries = json.dumps([{"url": url, "label": label} for url, label in pictures])
    return f'<pf-viewer mode="{mode}" pictures="{escape(entries)}"></pf-viewer>'


def empty(text: str) -> str:
    """Return a frame for content that does not exist yet."""
    return f'<div class="empty">{escape(text)}</div>'


def faces(found: Sequence[Found], pictures: int) -> str:
    """Return the pictures with their faces. pictures: number of all pictures."""
    items = "".join(
        f'<li><img src="{escape(one.picture)}" alt="{escape(one.name)} with frames around the faces">'
        f'<div class="text"><b>{escape(one.name)}</b><br>{escape(one.text)}</div></li>'
        for one in found
    )
    rest = f"<p>The first {len(found)} of {pictures} pictures are shown.</p>" if len(found) < pictures else ""
    return f'<h2 class="studio">Faces</h2><ul class="cards whole">{items}</ul>{rest}' if found else ""


def photographs(judged: Sequence[Judged]) -> str:
    """Return the photographs that are used, and those that are not, with the reason."""
    items = ""
    for one in judged:
        mark = f'<span class="mark no">Not used</span>: {escape(one.reason)}' if one.reason else ""
        mark = mark or '<span class="mark yes">Used</span>'
        kind = ' class="refused"' if one.reason else ""
        crop = f'<img src="{escape(one.crop)}" alt="Crop of {escape(one.name)}">' if one.crop else ""
        items += f"<li{kind}>{crop}"
        items += f'<div class="text"><b>{escape(one.name)}</b><br>{mark}</div></li>'
    return f'<ul class="cards">{items}</ul>' if judged else ""


def reading(found: Likeness | None, dropped: bool = False) -> str:
    """Return the likeness in words and as a number. dropped: it is compared with dropped photographs."""
    if found is None:
        return ""
    aside = ""
    if found.distance is not None:  # None without a face in the result
        against = "your photographs" if dropped else "the photographs that were learned"
        number = f"Distance to {against}: {found.distance:.2f}. Below 0.60 is usually the same person."
        aside = f" <span>{number}</span>"
    return f'<div class="likeness {found.level}"><strong>{escape(found.text)}</strong>{aside}</div>'


def results(outcomes: Sequence[tuple[Outcome, str]]) -> str:
    """Return the table of all results. Each outcome comes with the address of its result, empty without one."""
    rows = ""
    for outcome, address in outcomes:
        name = escape(outcome.job.source.name if outcome.job.source else "")
        if outcome.status == "done":
            found = likeness(outcome)
            others = [note for note in outcome.notes if found is None or not is_about_likeness(note)]
            notes = " ".join([*([found.text] if found else []), *others])
            link = f'<a href="{escape(address)}" download>Download<span hidden> {name}</span></a>'
            cells = [f"{outcome.width} x {outcome.height}", f"{outcome.seconds:.1f} s", escape(notes), link]
        else:
            cells = ["", "", escape(str(outcome.report().get("error", outcome.status))), ""]
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in (name, *cells)) + "</tr>"
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{text}</th>' for text in ("Picture", "Size", "Time", "Remarks", "Result"))
    return (
        '<div class="studio-scroll" tabindex="0" role="region" aria-label="Results"><table class="studio-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def download(address: str, text: str) -> str:
    """Return a link that downloads a file."""
    return f'<a class="studio-download" href="{escape(address)}" download>{escape(text)}</a>'


def plot(address: str, text: str) -> str:
    """Return a picture that keeps a readable size on a narrow screen, where it scrolls; text: its description."""
    return (
        f'<div class="studio-scroll" tabindex="0" role="region" aria-label="Times">'
        f'<img class="plot" src="{escape(address)}" alt="{escape(text)}"></div>'
    )


def preview(addresses: Sequence[str] | None) -> str:
    """Return photograph, degraded photograph and restoration beside each other."""
    if not addresses:
        return ""
    labels = ("Photograph", "Degraded copy", "Restored with what is learned so far")
    items = "".join(
        f'<figure><img src="{escape(address)}" alt="{label}"><figcaption>{label}</figcaption></figure>'
        for address, label in zip(addresses, labels, strict=True)
    )
    return f'<div class="triple">{items}</div>'


def people(known: Sequence[Known]) -> str:
    """Return the table of stored people."""
    if not known:
        return empty("Nobody is learned yet. Drop photographs above to learn the first person.")
    rows = "".join(f"<tr><td>{escape(one.name)}</td><td>{escape(one.text)}</td></tr>" for one in known)
    return (
        '<table class="studio-table"><thead><tr><th scope="col">Name</th><th scope="col">State</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of two columns, with a title if there is one."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    head = f'<h2 class="studio">{escape(title)}</h2>' if title else ""
    return f'{head}<table class="studio-table pairs"><tbody>{body}</tbody></table>'


def study_link(study: Study) -> str:
    """Return the link that raters open."""
    count = len(study.pictures)
    return (
        f'<p>Link for raters: <a href="study/{study.code}/" target="_blank">study/{study.code}/</a> at the address of '
        f"this page. {count} picture{'s' if count > 1 else ''} of {len(study.methods)} methods.</p>"
    )


def study_results(study: Study, shares: Sequence[Share]) -> str:
    """Return a bar for every method and question, with the interval."""
    parts = []
    for question, text in QUESTIONS.items():
        own = [share for share in shares if share.question == question]
        rows = "".join(
            f'<tr><th scope="row">{escape(one.method)}</th><td>{bar(one)}</td>'
            f"<td>{one.share:.0%}</td><td>{one.low:.0%} to {one.high:.0%}</td><td>{one.votes} of {one.of}</td></tr>"
            for one in own
        )
        head = "".join(f'<th scope="col">{word}</th>' for word in ("Method", "", "Share", "95 % interval", "Votes"))
        parts.append(
            f'<h2 class="studio">{escape(text)}</h2><div class="studio-scroll" tabindex="0" role="region" '
            f'aria-label="{escape(text)}"><table class="studio-table bars"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def bar(share: Share) -> str:
    """Return a bar of a share, with a line over its interval."""
    low, high, value = (200 * number for number in (share.low, share.high, share.share))
    return (
        '<svg viewBox="0 0 200 20" height="20" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="200" height="20" rx="4" fill="currentColor" opacity=".08"/>'
        f'<rect width="{value:.1f}" height="20" rx="4" fill="#4aa292"/>'
        f'<path d="M{low:.1f} 10H{high:.1f}M{low:.1f} 5v10M{high:.1f} 5v10" stroke="currentColor" '
        'stroke-width="1.5"/></svg>'
    )
