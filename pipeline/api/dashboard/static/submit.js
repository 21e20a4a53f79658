// Submission of a file: keeps the command beside the form in step with its fields, and says that the file is being sent.

const PATIENCE_MS = 200;

const form = document.getElementById("submission");
const line = document.querySelector("#command .command");
let timer = null;
let asked = null;

async function tell() {
  asked?.abort();
  asked = new AbortController();
  const fields = new FormData(form);
  fields.set("file", form.elements.file.files[0]?.name ?? "");
  const reply = await fetch("/submit/command", {
    method: "POST",
    body: new URLSearchParams(fields),
    signal: asked.signal,
  }).catch(() => null);
  // A later change asks again, so the old command may stay meanwhile.
  if (!reply?.ok || reply.redirected) return;
  const words = await reply.text();
  line.querySelector("code").textContent = words;
  line.querySelector("button").dataset.copy = words;
}

form?.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(tell, PATIENCE_MS);
});

form?.addEventListener("submit", () => {
  document.getElementById("sending").hidden = false;
  form.querySelector("button.main").disabled = true;
});
