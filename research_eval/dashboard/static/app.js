// Which page the address asks for.
import { h, notReady, put, ready } from "./dom.js";
import { atlasPage } from "./atlas.js";
import { runPage } from "./run.js";
import { comparePage, runsPage } from "./runs.js";
import { studyPage } from "./study.js";

const PAGES = [
  [/^\/(?:runs)?$/, "Runs", (page) => runsPage(page)],
  [/^\/compare$/, "Compare", (page) => comparePage(page)],
  [/^\/run\/([\w-]+)$/, "Run", runPage],
  [/^\/study\/(.+)$/, "Study", (page, name) => studyPage(page, decodeURIComponent(name))],
  [/^\/atlas\/([\w-]+)$/, "Atlas", atlasPage],
];

async function show() {
  notReady();
  const page = document.getElementById("page");
  const crumbs = document.getElementById("crumbs");
  for (const [pattern, title, draw] of PAGES) {
    const found = location.pathname.match(pattern);
    if (!found) continue;
    document.title = `${title}${found[1] ? ` ${decodeURIComponent(found[1])}` : ""} – Graph-of-Experts`;
    const run = /^\/(?:atlas)\//.test(location.pathname) ? h("a", { href: `/run/${found[1]}` }, found[1]) : found[1] ? decodeURIComponent(found[1]) : "";
    put(crumbs, h("a", { href: "/runs" }, "runs"), run ? " / " : "", run);
    try {
      await draw(page, found[1]);
    } catch (error) {
      put(page, h("h1", {}, title), h("p", { class: "error", role: "alert" }, error.message));
      ready("error");
    }
    return;
  }
  put(page, h("p", { class: "error" }, "There is no such page."));
  ready("error");
}

function theme(next) {
  const wanted = next || localStorage.getItem("goe-theme");
  if (wanted) document.documentElement.dataset.theme = wanted;
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  localStorage.setItem("goe-theme", dark ? "light" : "dark");
  theme(dark ? "light" : "dark");
});
window.addEventListener("popstate", show);
theme();
show();
