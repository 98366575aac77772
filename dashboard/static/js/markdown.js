// Markdown as a tree of elements. What a model writes is text and stays text: no HTML is made of it, and links lead to
// the web or nowhere.

import { h } from "./vdom.js";

export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
    if (fence) {
      const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const code = [];
      at += 1;
      while (at < lines.length && !end.test(lines[at])) code.push(lines[at++]);
      at += 1;
      found.push({ kind: "code", language: fence[2], text: code.join("\n") });
    } else if (/^\s*$/.test(line)) {
      at += 1;
    } else if (/^ {0,3}#{1,6}\s/.test(line)) {
      const [, marks, title] = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/.exec(line) || [null, "#", line];
      found.push({ kind: "heading", level: marks.length, text: title });
      at += 1;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      found.push({ kind: "rule" });
      at += 1;
    } else if (/^ {0,3}>/.test(line)) {
      const quoted = [];
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) quoted.push(lines[at++].replace(/^ {0,3}> ?/, ""));
      found.push({ kind: "quote", blocks: blocks(quoted.join("\n")) });
    } else if (isTable(lines, at)) {
      const rows = [];
      while (at < lines.length && lines[at].includes("|")) rows.push(cells(lines[at++]));
      found.push({ kind: "table", head: rows[0], rows: rows.slice(2) });
    } else if (ITEM.test(line)) {
      const [list, next] = readList(lines, at);
      found.push(list);
      at = next;
    } else {
      const paragraph = [];
      while (at < lines.length && !/^\s*$/.test(lines[at]) && !interrupts(lines, at, paragraph.length)) paragraph.push(lines[at++]);
      found.push({ kind: "paragraph", text: paragraph.join("\n") });
    }
  }
  return found;
}

const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function interrupts(lines, at, taken) {
  return taken > 0 && (/^ {0,3}(`{3,}|~{3,}|#{1,6}\s|>)/.test(lines[at]) || ITEM.test(lines[at]));
}

function isTable(lines, at) {
  return lines[at].includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] || "") && lines[at + 1].includes("-");
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function readList(lines, start) {
  const first = ITEM.exec(lines[start]);
  const ordered = /\d/.test(first[2]);
  const indent = first[1].length;
  const items = [];
  let at = start;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (item && item[1].length <= indent + 1 && /\d/.test(item[2]) === ordered) {
      items.push([item[3]]);
    } else if (/^\s*$/.test(lines[at])) {
      const next = lines[at + 1] || "";
      if (!ITEM.test(next) && !/^ {2,}/.test(next)) break;
    } else if (/^ {2,}/.test(lines[at])) {
      items[items.length - 1].push(lines[at].replace(/^ {2,4}/, ""));
    } else {
      break;
    }
    at += 1;
  }
  return [{ kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, items: items.map((item) => blocks(item.join("\n"))) }, at];
}

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([\s\S]+?)\*\*|__([\s\S]+?)__|(?<![\w*])\*([^\s*](?:[\s\S]*?[^\s*])?)\*(?!\w)|(?<![\w_])_([^\s_](?:[\s\S]*?[^\s_])?)_(?!\w)|~~([\s\S]+?)~~|\[([^\]\n]+)\]\(([^\s)]+)(?:\s+"[^"]*")?\)|(https?:\/\/[^\s<>)\]]+[^\s<>)\].,;:!?'"])/g;

export function inline(text, depth = 0) {
  if (depth > 6) return [text];
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) found.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const [whole, , code, bold, bold2, italic, italic2, struck, label, target, bare] = match;
    if (code !== undefined) found.push(h("code", null, code.replace(/^ (.+) $/, "$1")));
    else if (bold ?? bold2) found.push(h("strong", null, inline(bold ?? bold2, depth + 1)));
    else if (italic ?? italic2) found.push(h("em", null, inline(italic ?? italic2, depth + 1)));
    else if (struck) found.push(h("del", null, inline(struck, depth + 1)));
    else if (bare) found.push(link(bare, [bare]));
    else found.push(isWeb(target) ? link(target, inline(label, depth + 1)) : whole);
  }
  if (at < text.length) found.push(text.slice(at));
  return found;
}

export function isWeb(target) {
  try {
    return ["http:", "https:"].includes(new URL(target).protocol);
  } catch {
    return false;
  }
}

function link(target, content) {
  return h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}

// `copy(text)` is called for a block of code. Headings of an answer come below those of the page.
export function markdown(text, copy) {
  return blocks(text).map((block) => draw(block, copy));
}

function draw(block, copy) {
  switch (block.kind) {
    case "code":
      return h("div", { class: "code" },
        h("div", { class: "code-head" }, h("span", null, block.language || "text"),
          h("button", { type: "button", class: "button small", onclick: () => copy(block.text) }, "Copy")),
        h("pre", { tabindex: 0 }, h("code", null, block.text)));
    case "heading":
      return h(`h${Math.min(6, block.level + 3)}`, { class: `heading level-${block.level}` }, inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", null, block.blocks.map((inner) => draw(inner, copy)));
    case "list":
      return h(block.ordered ? "ol" : "ul", block.ordered ? { start: block.start } : null,
        block.items.map((item) => h("li", null, item.length === 1 && item[0].kind === "paragraph" ? inline(item[0].text) : item.map((inner) => draw(inner, copy)))));
    case "table":
      return h("div", { class: "table-wrap", tabindex: 0, role: "group", "aria-label": "Table" }, h("table", null,
        h("thead", null, h("tr", null, block.head.map((cell) => h("th", null, inline(cell))))),
        h("tbody", null, block.rows.map((row) => h("tr", null, row.map((cell) => h("td", null, inline(cell))))))));
    default:
      return h("p", null, inline(block.text));
  }
}
