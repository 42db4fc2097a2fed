// Gradio reports the end of a slider's movement for the mouse only. Here a key that moved a slider reports it too.
document.addEventListener("keyup", (event) => {
  if (event.target.matches?.("gradio-app input[type=range], .gradio-container input[type=range]"))
    if (/^(Arrow|Page|Home|End)/.test(event.key)) event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
});
