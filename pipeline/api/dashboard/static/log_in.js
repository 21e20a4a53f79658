// A visitor who came by a link on another site may be logged in: only a request from this page carries the cookie.

const reply = await fetch("/login/known", { cache: "no-store" }).catch(() => null);
if (reply?.status === 200) location.replace(document.forms["log-in"].elements.next.value);
