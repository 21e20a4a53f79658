// Copies what a button carries.

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
    // By plain http from another machine there is no clipboard but the old way.
    const field = document.createElement("textarea");
    field.value = words;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
