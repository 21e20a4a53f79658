// Confirmation prompts ("are you sure"): close them by Escape, or by a click beside them.

document.addEventListener("keydown", (event) => {
  const ask = event.key === "Escape" && event.target.closest?.("details.ask[open]");
  if (!ask) return;
  ask.open = false;
  ask.querySelector("summary").focus();
});

document.addEventListener("click", (event) => {
  for (const ask of document.querySelectorAll("details.ask[open]")) {
    if (!ask.contains(event.target)) ask.open = false;
  }
});
