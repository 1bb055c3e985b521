// Renders the formulas that pymdownx.arithmatex has marked: \(...\) in a line, \[...\] on lines of their own.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const [, left, latex] = /^\s*(\\\(|\\\[)([^]*)\\[)\]]\s*$/.exec(element.textContent)
    katex.render(latex, element, { displayMode: left === "\\[", throwOnError: true, strict: false })
  }
})
