(function () {
  "use strict";
  try {
    var saved = localStorage.getItem("equipoise-theme");
    if (saved === "light" || saved === "dark") document.documentElement.setAttribute("data-theme", saved);
  } catch (error) { /* storage may be closed to files; the system's wish then holds */ }
  document.documentElement.classList.add("scripted");
})();
