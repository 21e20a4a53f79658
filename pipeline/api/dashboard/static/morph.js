// DOM patching: makes an element like another one by few changes, so that the rest keeps its focus, hover and state.

// Attributes that a person changes on the page; a refresh leaves them alone.
const THEIRS = { DETAILS: ["open"], INPUT: ["value", "checked"] };

export function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  matchAttributes(old, fresh);
  matchChildren(old, fresh);
}

function matchAttributes(old, fresh) {
  const theirs = THEIRS[old.tagName] || [];
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !theirs.includes(name)) old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !theirs.includes(name)) old.setAttribute(name, value);
  }
}

function matchChildren(old, fresh) {
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const kept = (wanted.id && named.get(wanted.id)) || (alike(at, wanted) ? at : null);
    if (!kept) {
      old.insertBefore(document.importNode(wanted, true), at);
      continue;
    }
    if (kept === at) at = at.nextSibling;
    else old.insertBefore(kept, at);
    if (kept.nodeType === Node.ELEMENT_NODE) morph(kept, wanted);
    else if (kept.data !== wanted.data) kept.data = wanted.data;
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function alike(node, wanted) {
  return node && node.nodeType === wanted.nodeType && node.nodeName === wanted.nodeName && node.id === wanted.id
    && node.className?.baseVal === wanted.className?.baseVal && sameForm(node, wanted);
}

// A form with another action is another form, even in the same place.
function sameForm(node, wanted) {
  return node.nodeName !== "FORM" || node.getAttribute("action") === wanted.getAttribute("action");
}
