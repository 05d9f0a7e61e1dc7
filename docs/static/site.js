// What the theme leaves out for readers without a mouse: levels of captions, names of landmarks, focus of what scrolls.
addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("p.caption[role=heading]")) caption.setAttribute("aria-level", "2");
  document.querySelector("aside.sidebar-drawer")?.setAttribute("aria-label", "Pages");
  document.querySelector("aside.toc-drawer")?.setAttribute("aria-label", "On this page");
  for (const code of document.querySelectorAll("pre")) code.tabIndex = 0;
  for (const [index, table] of document.querySelectorAll(".table-wrapper").entries()) {
    table.tabIndex = 0;
    table.setAttribute("role", "region");
    table.setAttribute("aria-label", `Table ${index + 1}`);
  }
});
