// Live refresh by polling: asks the server every second or so, and changes only the parts that have changed.

import { morph } from "./morph.js";

const SLOWEST_MS = 30_000;
const PATIENCE_MS = 15_000;
// A page that takes the server long is polled less often.
const REST_FACTOR = 4;

const main = document.querySelector("main");
const lost = document.getElementById("lost");
let etag = null;
let failures = 0;
let timer = null;
let asking = false;

function seconds() {
  return Number(main.dataset.live || 0);
}

function plan(milliseconds) {
  clearTimeout(timer);
  if (seconds() && document.visibilityState === "visible") timer = setTimeout(ask, milliseconds);
}

async function ask() {
  // A page that isn't live may be a form's answer, such as a new key, which has no address to be polled at.
  if (asking || !seconds()) return;
  asking = true;
  const began = performance.now();
  try {
    const reply = await fetch(location.href, {
      headers: etag ? { "If-None-Match": etag } : {},
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (reply.redirected) {
      // The key is revoked or has expired.
      location.assign(reply.url);
      return;
    }
    if (reply.status >= 500) throw new Error(`status ${reply.status}`);
    if (reply.status !== 304) {
      etag = reply.headers.get("etag");
      show(await reply.text());
    }
    found();
    plan(Math.max(seconds() * 1_000, REST_FACTOR * (performance.now() - began)));
  } catch (error) {
    lose(error);
  } finally {
    asking = false;
  }
}

function show(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  // Header and footer too: the error page for a database that is away was rendered without the viewer.
  for (const part of ["header", "main", "footer"]) morph(document.querySelector(part), fresh.querySelector(part));
  if (document.title !== fresh.title) document.title = fresh.title;
  document.dispatchEvent(new Event("fresh"));
}

function found() {
  failures = 0;
  lost.hidden = true;
}

function lose(error) {
  failures += 1;
  const wait = Math.min(SLOWEST_MS, 1_000 * 2 ** (failures - 1));
  const what = error instanceof TypeError ? "The server can’t be reached" : "The server has no answer now";
  // A single slow answer isn't worth a message.
  if (failures > 1) {
    lost.textContent = `${what}. What you see may be old; trying again by itself.`;
    lost.hidden = false;
  }
  plan(wait);
}

document.addEventListener("visibilitychange", () => (document.visibilityState === "visible" ? ask() : clearTimeout(timer)));
window.addEventListener("online", ask);
plan(seconds() * 1_000);
