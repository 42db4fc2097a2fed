// <pf-viewer>: pictures that are compared, with one zoom and one position for all of them.
// Attributes: mode="slide" (two pictures on each other, with a divide) or "side" (pictures beside each other);
// pictures='[{"url": ..., "label": ...}, ...]'.
class PictureViewer extends HTMLElement {
  static get observedAttributes() {
    return ["pictures", "mode"];
  }

  connectedCallback() {
    this.attachShadow({ mode: "open" });
    this.draw();
  }

  attributeChangedCallback() {
    if (this.shadowRoot) this.draw();
  }

  draw() {
    const pictures = JSON.parse(this.getAttribute("pictures") || "[]");
    this.slide = this.getAttribute("mode") !== "side" && pictures.length === 2;
    this.zoom = this.zoom || 1;
    this.x = this.x || 0;
    this.y = this.y || 0;
    this.shadowRoot.innerHTML = `<style>${PictureViewer.style}</style>
      <div class="stage ${this.slide ? "slide" : "side"}" tabindex="0" role="group"></div>
      <div class="bar" role="toolbar" aria-label="View"></div>`;
    this.stage = this.shadowRoot.querySelector(".stage");
    this.stage.setAttribute(
      "aria-label",
      "Pictures. Plus and minus zoom, arrow keys move the picture" + (this.slide ? "" : "s") + ", 0 fits it."
    );
    this.panes = pictures.map((picture) => this.pane(picture));
    this.stage.append(...this.panes);
    this.drawBar();
    this.listen();
    this.place();
  }

  pane(picture) {
    const pane = document.createElement("figure");
    const image = document.createElement("img");
    image.src = picture.url;
    image.alt = picture.label;
    image.draggable = false;
    const label = document.createElement("figcaption");
    label.textContent = picture.label;
    image.addEventListener("load", () => this.place());
    pane.append(image, label);
    return pane;
  }

  drawBar() {
    const bar = this.shadowRoot.querySelector(".bar");
    if (this.slide) {
      const label = document.createElement("label");
      label.textContent = "Before / after ";
      this.divide = document.createElement("input");
      Object.assign(this.divide, { type: "range", min: 0, max: 100, value: this.share ?? 50 });
      this.divide.addEventListener("input", () => this.place());
      label.append(this.divide);
      bar.append(label);
    }
    const actions = [
      ["−", "Zoom out", () => this.zoomBy(1 / 1.5)],
      ["+", "Zoom in", () => this.zoomBy(1.5)],
      ["Fit", "Fit the picture", () => this.fit()],
      ["1:1", "Full size: one pixel of the picture on one pixel of the screen", () => this.full()],
    ];
    if (document.fullscreenEnabled) actions.push(["Full screen", "Full screen", () => this.fullScreen()]);
    for (const [text, title, action] of actions) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: text, title });
      button.setAttribute("aria-label", title);
      button.addEventListener("click", action);
      bar.append(button);
    }
    this.state = document.createElement("span");
    this.state.className = "state";
    bar.append(this.state);
  }

  listen() {
    const stage = this.stage;
    let held = null;
    stage.addEventListener("pointerdown", (event) => {
      held = [event.clientX, event.clientY];
      stage.setPointerCapture(event.pointerId);
      if (this.slide && this.zoom === 1) this.moveDivide(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (!held) return;
      if (this.slide && this.zoom === 1) return this.moveDivide(event);
      this.move(event.clientX - held[0], event.clientY - held[1]);
      held = [event.clientX, event.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (held = null));
    stage.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && this.zoom === 1 && event.deltaY > 0) return; // the page scrolls on
        event.preventDefault();
        this.zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2);
      },
      { passive: false }
    );
    stage.addEventListener("keydown", (event) => {
      const step = 40;
      const keys = {
        "+": () => this.zoomBy(1.5),
        "=": () => this.zoomBy(1.5),
        "-": () => this.zoomBy(1 / 1.5),
        0: () => this.fit(),
        ArrowLeft: () => this.move(step, 0),
        ArrowRight: () => this.move(-step, 0),
        ArrowUp: () => this.move(0, step),
        ArrowDown: () => this.move(0, -step),
      };
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    new ResizeObserver(() => this.place()).observe(stage);
  }

  moveDivide(event) {
    const box = this.panes[0].getBoundingClientRect();
    this.divide.value = (100 * (event.clientX - box.left)) / box.width;
    this.place();
  }

  zoomBy(factor) {
    this.zoom = Math.min(32, Math.max(1, this.zoom * factor));
    if (this.zoom < 1.01) this.fit();
    else this.place();
  }

  fit() {
    [this.zoom, this.x, this.y] = [1, 0, 0];
    this.place();
  }

  full() {
    const image = this.shadowRoot.querySelector("img:last-of-type");
    const shown = this.panes.at(-1).querySelector("img");
    if (!image || !shown.naturalWidth) return;
    const box = shown.parentElement.getBoundingClientRect();
    const fitted = Math.min(box.width / shown.naturalWidth, box.height / shown.naturalHeight);
    this.zoom = Math.min(32, Math.max(1, 1 / (fitted * devicePixelRatio)));
    this.place();
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.requestFullscreen();
  }

  move(dx, dy) {
    if (this.zoom === 1) return;
    this.x += dx;
    this.y += dy;
    this.place();
  }

  place() {
    if (!this.panes.length) return;
    const box = this.panes[0].getBoundingClientRect();
    const limit = (size) => (size * (this.zoom - 1)) / 2;
    this.x = Math.max(-limit(box.width), Math.min(limit(box.width), this.x));
    this.y = Math.max(-limit(box.height), Math.min(limit(box.height), this.y));
    for (const pane of this.panes) {
      const image = pane.querySelector("img");
      image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.zoom})`;
      image.style.imageRendering = this.zoom > 6 ? "pixelated" : "auto";
    }
    if (this.slide) {
      this.share = Number(this.divide.value);
      this.stage.style.setProperty("--divide", `${this.share}%`);
    }
    this.state.textContent = this.zoom === 1 ? "" : `${this.zoom.toFixed(1)} ×`;
  }
}

PictureViewer.style = `
:host { display: block; font: 14px/1.4 system-ui, sans-serif; color: var(--body-text-color); }
:host(:fullscreen) { background: var(--background-fill-primary); padding: 12px; }
:host(:fullscreen) .stage { height: calc(100vh - 90px); }
.stage { height: min(68vh, 640px, 110vw); display: grid; gap: 6px; touch-action: pan-y; cursor: grab; border-radius: 10px;
  overflow: hidden; background: #191816; }
.stage:focus-visible, button:focus-visible, input:focus-visible { outline: 3px solid #4aa292; outline-offset: 2px; }
.side { grid-template-columns: repeat(auto-fit, minmax(min(100%, 210px), 1fr)); grid-auto-rows: minmax(220px, 1fr);
  height: auto; min-height: min(60vh, 520px); }
figure { margin: 0; position: relative; overflow: hidden; min-height: 0; }
.slide figure { grid-area: 1 / 1; }
.slide figure:last-child { clip-path: inset(0 0 0 var(--divide, 50%)); }
.slide::after { content: ""; grid-area: 1 / 1; width: 2px; background: #fff; margin-left: calc(var(--divide, 50%) - 1px);
  pointer-events: none; box-shadow: 0 0 6px #000; z-index: 1; }
img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; user-select: none; }
figcaption { position: absolute; top: 10px; left: 10px; padding: 2px 10px; border-radius: 99px; background: #000000c0;
  color: #fff; font-size: 13px; max-width: calc(100% - 40px); overflow: hidden; text-overflow: ellipsis; }
.slide figure:last-child figcaption { left: auto; right: 10px; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; margin-top: 10px; }
.bar label { display: flex; align-items: center; gap: 10px; flex: 1 1 240px; }
.bar input { flex: 1; accent-color: #227d6d; min-width: 80px; height: 24px; }
button { font: inherit; min-width: 40px; min-height: 36px; border-radius: 8px; border: 1px solid #8d877b;
  background: var(--background-fill-primary); color: var(--body-text-color); cursor: pointer; }
button:hover { border-color: #227d6d; }
.state { min-width: 3.5em; color: var(--body-text-color-subdued); }
`;
customElements.define("pf-viewer", PictureViewer);
