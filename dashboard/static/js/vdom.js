// A small virtual DOM: pages are functions from state to a tree, and only what has changed touches the document. Text
// stays text: nothing here makes HTML from strings.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "g", "polyline", "polygon", "text", "defs", "marker"]);
const PROPERTIES = new Set(["value", "checked", "disabled", "selected", "open", "indeterminate"]);

export function h(tag, props, ...children) {
  return { tag, props: props || {}, children: flat(children) };
}

// What is not there holds its place as an empty text, so that what comes after it stays the same element.
const flat = (nodes) => nodes.flat(Infinity).map((node) => (node == null || typeof node === "boolean" ? "" : node));

const isText = (node) => typeof node !== "object";
const keyOf = (node) => (isText(node) ? undefined : node.props.key);
const alike = (a, b) => (isText(a) ? isText(b) : !isText(b) && a.tag === b.tag && keyOf(a) === keyOf(b));

function create(node, inSvg) {
  if (isText(node)) return document.createTextNode(String(node));
  const svg = SVG_TAGS.has(node.tag) && (inSvg || node.tag === "svg");
  const element = svg ? document.createElementNS(SVG, node.tag) : document.createElement(node.tag);
  for (const [name, value] of Object.entries(node.props)) setProp(element, name, value, undefined);
  for (const child of node.children) element.append(create(child, svg));
  // A select's value needs its options first.
  if (node.tag === "select" && "value" in node.props) element.value = node.props.value;
  if (node.props.ref) node.props.ref(element);
  return element;
}

function setProp(element, name, value, old) {
  if (name === "key" || name === "ref" || value === old) return;
  if (name.startsWith("on")) {
    element[name] = value || null;
  } else if (name === "style") {
    for (const key of Object.keys(old || {})) if (!value || !(key in value)) element.style.removeProperty(key);
    for (const [key, text] of Object.entries(value || {})) element.style.setProperty(key, text);
  } else if (PROPERTIES.has(name) && element.tagName !== "OPTION") {
    if (element[name] !== value) element[name] = value ?? (name === "value" ? "" : false);
  } else if (value == null || value === false) {
    element.removeAttribute(name === "class" ? "class" : name);
  } else {
    element.setAttribute(name, value === true ? "" : String(value));
  }
}

function update(element, old, node) {
  if (isText(node)) {
    if (String(old) !== String(node)) element.data = String(node);
    return;
  }
  const names = new Set([...Object.keys(old.props), ...Object.keys(node.props)]);
  for (const name of names) setProp(element, name, node.props[name], old.props[name]);
  updateChildren(element, old.children, node.children, SVG_TAGS.has(node.tag));
  for (const name of ["value", "checked"]) {  // what the user has changed meanwhile
    if (name in node.props && element[name] !== node.props[name]) element[name] = node.props[name] ?? "";
  }
}

function updateChildren(parent, before, after, inSvg) {
  const elements = [...parent.childNodes];
  const keyed = new Map();
  before.forEach((node, index) => keyOf(node) !== undefined && keyed.set(keyOf(node), index));
  const taken = new Set();
  let free = 0;
  const find = (node) => {
    const key = keyOf(node);
    if (key !== undefined) {
      const index = keyed.get(key);
      return index !== undefined && !taken.has(index) && alike(before[index], node) ? index : -1;
    }
    while (free < before.length && (taken.has(free) || keyOf(before[free]) !== undefined)) free += 1;
    return free < before.length && alike(before[free], node) ? free : -1;
  };
  let cursor = parent.firstChild;
  const kept = new Set();
  for (const node of after) {
    const index = find(node);
    const element = index >= 0 ? elements[index] : create(node, inSvg);
    if (index >= 0) {
      taken.add(index);
      update(element, before[index], node);
    } else if (keyOf(node) === undefined && free < before.length) {
      taken.add(free);  // another kind of node takes its place
    }
    kept.add(element);
    if (element === cursor) cursor = cursor.nextSibling;
    else parent.insertBefore(element, cursor);
  }
  for (const element of elements) if (!kept.has(element)) element.remove();
}

const drawn = new WeakMap();

// Have `root` hold exactly `nodes`.
export function render(root, ...nodes) {
  const after = flat(nodes);
  if (!drawn.has(root)) root.replaceChildren();
  updateChildren(root, drawn.get(root) || [], after, false);
  drawn.set(root, after);
}
