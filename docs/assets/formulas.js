// Each page's formulas, as pymdownx.arithmatex marks them
document$.subscribe(({ body }) => {
  const delimiters = [{ left: "\\(", right: "\\)", display: false }, { left: "\\[", right: "\\]", display: true }]
  body.querySelectorAll(".arithmatex").forEach(formula => renderMathInElement(formula, { delimiters }))
})
