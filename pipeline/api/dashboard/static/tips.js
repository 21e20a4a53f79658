// Tooltips of columns and cells: under the pointer, or with the arrow keys once the chart has the focus.

const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "status");
document.body.append(tip);

let shown = null;

export function say(element, words, milliseconds = 0) {
  tip.textContent = words;
  place(element);
  if (milliseconds) setTimeout(() => shown || (tip.textContent = ""), milliseconds);
}

function place(element) {
  const here = element.getBoundingClientRect();
  const left = here.left + here.width / 2 - tip.offsetWidth / 2;
  const above = here.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above < 8 ? here.bottom + 8 : above}px`;
}

function show(element) {
  if (shown) shown.classList.remove("at");
  shown = element;
  if (!element) {
    tip.textContent = "";
    return;
  }
  element.classList.add("at");
  say(element, element.dataset.tip.replaceAll("|", "\n"));
}

// Not pointerover, which is also sent when the page scrolls beneath a resting pointer.
for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const found = event.target.closest?.("[data-tip]") ?? null;
    if (found !== shown) show(found);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(null);
  if (event.key === "Enter" && event.target.closest?.("[data-tips]") && shown?.href) location.assign(shown.href);
  const all = event.target.closest?.("[data-tips]")?.querySelectorAll("[data-tip]");
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!all?.length || !step) return;
  event.preventDefault();
  const at = shown ? [...all].indexOf(shown) : step > 0 ? -1 : all.length;
  show(all[Math.max(0, Math.min(all.length - 1, at + step))]);
});

document.addEventListener("focusout", (event) => event.target.closest?.("[data-tips]") && show(null));
document.addEventListener("scroll", () => shown && place(shown), { passive: true });
// After a refresh, the element that is shown may mean something else, or be gone.
document.addEventListener("fresh", () => shown && show(shown.isConnected ? shown : null));
