// Shows a Markdown page.

import { base, read, show } from "./access.js";
import { Marked } from "./marked.esm.js";

const escape = text => text.replace(/[&<>"]/g, character => `&#${character.charCodeAt(0)};`);
const marked = new Marked({ renderer: { html: ({ text }) => escape(text) } });

// Returns the anchor of a heading, as GitHub makes it.
const anchor = text => text.toLowerCase().replace(/[^\p{L}\p{N}_\- ]/gu, "").trim().replaceAll(" ", "-");

// Returns the name that the address has behind #; empty if it is malformed.
function fragment() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

// Returns the URL of a link, or null if it leads to a file that is no page.
function target(link) {
  if (/^(#|https?:)/.test(link)) return link;
  const page = link.match(/^(?:[\w.-]*\/)*([\w-]+)\.md(#.*)?$/);
  return page && `${base}/docs/${page[1].toLowerCase()}${page[2] ?? ""}`;
}

function element(name, attributes, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

function addCopyButton(block) {
  if (!navigator.clipboard) return; // browsers have it for HTTPS and localhost only
  const button = element("button", { type: "button", className: "copy", textContent: "Copy" });
  button.onclick = async () => {
    await navigator.clipboard.writeText(block.innerText);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  const code = block.parentElement;
  const wrapper = element("div", { className: "code" });
  code.replaceWith(wrapper);
  wrapper.append(code, button);
}

function addContents(article) {
  const headings = [...article.querySelectorAll("h2, h3")];
  document.getElementById("contents").append(
    ...headings.map(heading => {
      const link = element("a", { href: `#${heading.id}`, textContent: heading.textContent });
      return element("li", { className: heading.localName }, link);
    }),
  );
  document.querySelector(".contents").hidden = headings.length < 2;
}

// Adds links to the pages before and after this one, in the order of the sidebar.
function addNeighbours(article) {
  const pages = [...document.querySelectorAll(".sidebar a")];
  const here = pages.findIndex(link => link.ariaCurrent);
  const links = [-1, 1].map(step => {
    const link = pages[here + step]?.cloneNode(true);
    link?.classList.add(step < 0 ? "previous" : "next");
    return link ?? "";
  });
  article.append(element("nav", { className: "neighbours", ariaLabel: "Neighbouring pages" }, ...links));
}

const sidebar = document.querySelector(".sidebar");
const narrow = matchMedia("(max-width: 900px)");
const fit = () => (sidebar.open = !narrow.matches);
narrow.onchange = fit;
fit();

await show(async () => {
  const article = document.getElementById("page");
  const text = await (await read(`/docs/${article.dataset.name}.md`)).text();
  article.innerHTML = marked.parse(text);
  for (const heading of article.querySelectorAll("h1, h2, h3, h4")) {
    heading.id = anchor(heading.textContent);
  }
  addContents(article);
  for (const heading of article.querySelectorAll("h2, h3, h4")) {
    heading.append(element("a", { className: "anchor", href: `#${heading.id}`, ariaLabel: "Link to this section" }, "#"));
  }
  for (const link of article.querySelectorAll("a:not(.anchor)")) {
    const url = target(link.getAttribute("href"));
    if (url) link.href = url;
    else link.replaceWith(...link.childNodes);
  }
  for (const table of article.querySelectorAll("table")) {
    const scroller = element("div", { className: "table", tabIndex: 0 });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  article.querySelectorAll("pre > code").forEach(addCopyButton);
  addNeighbours(article);
  // The browser looked for it before the page had it.
  document.getElementById(fragment())?.scrollIntoView();
});
