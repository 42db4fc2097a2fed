// Gradio shows the keys of some of its own labels instead of their texts.
const texts = { "common.upload": "Add files", "common.clear": "Remove all files" };
new MutationObserver(() => {
  for (const [key, text] of Object.entries(texts)) {
    for (const element of document.querySelectorAll(`[aria-label="${key}"]`)) {
      element.setAttribute("aria-label", text);
      element.title = text;
    }
  }
}).observe(document.documentElement, { childList: true, subtree: true });
