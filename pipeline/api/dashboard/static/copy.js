// Copy buttons: copy the text of `data-copy` to the clipboard.

import { say } from "./tips.js";

const SEEN_MS = 1_500;

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (button) say(button, (await copy(button.dataset.copy)) ? "Copied" : "Copying isn’t allowed here", SEEN_MS);
});

async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    // Browsers have no clipboard API on plain http from another machine; fall back to the old command.
    const field = document.createElement("textarea");
    field.value = words;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
