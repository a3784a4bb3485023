(function () {
  "use strict";
  var root = document.documentElement;
  var find = function (id) { return document.getElementById(id); };
  var make = function (tag, css, text) {
    var element = document.createElement(tag);
    if (css) element.className = css;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Light and dark: the system's wish until the reader says otherwise.
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  find("theme").addEventListener("click", function () {
    var now = root.getAttribute("data-theme") || (dark.matches ? "dark" : "light");
    var next = now === "dark" ? "light" : "dark";
    root.setAttribute("data-theme", next);
    try { localStorage.setItem("equipoise-theme", next); } catch (error) { /* storage may be closed to files */ }
  });

  // Which section is being read.
  var links = Array.prototype.slice.call(document.querySelectorAll("nav li a"));
  var parts = links.map(function (link) { return find(link.hash.slice(1)); });
  var current = null, waiting = false;
  function follow() {
    waiting = false;
    var index = 0;
    parts.forEach(function (part, number) { if (part.getBoundingClientRect().top < window.innerHeight * 0.35) index = number; });
    if (links[index] === current) return;
    if (current) current.removeAttribute("aria-current");
    current = links[index];
    current.setAttribute("aria-current", "true");
    var strip = current.closest("ul");
    strip.scrollLeft = current.offsetLeft - strip.offsetLeft - 40;
  }
  window.addEventListener("scroll", function () {
    if (!waiting) { waiting = true; window.requestAnimationFrame(follow); }
  }, { passive: true });
  follow();

  // Token credit: the numbers of the piece pointed at or in focus. Each reply is one stop of the Tab key; arrows go on inside.
  var tip = find("credit-tip");
  if (tip) {
    var NAMES = {
      credit: "credit", trained: "log π, trained", reference: "log π, reference", ratio: "as likely as before", reward: "reward r, from the logits", tokens: "tokens"
    };
    var pieceOf = function (event) { return event.target.closest ? event.target.closest(".pieces .c") : null; };
    var hide = function () { tip.hidden = true; };
    var tell = function (piece) {
      tip.firstChild.textContent = piece.textContent;
      tip.lastChild.replaceChildren.apply(tip.lastChild, [].concat.apply([], piece.dataset.told.split("\n").map(function (line) {
        var parts = line.split("\t");
        return [make("dt", "", NAMES[parts[0]]), make("dd", "", parts[1])];
      })));
      tip.hidden = false;
      var box = piece.getClientRects()[0] || piece.getBoundingClientRect(), own = tip.getBoundingClientRect();
      var below = box.bottom + 8 + own.height < window.innerHeight;
      tip.style.left = Math.max(8, Math.min(box.left, root.clientWidth - own.width - 8)) + "px";
      tip.style.top = Math.max(8, below ? box.bottom + 8 : box.top - own.height - 8) + "px";
    };
    document.querySelectorAll(".pieces").forEach(function (reply) {
      reply.querySelectorAll(".c").forEach(function (piece, index) {
        piece.tabIndex = index ? -1 : 0;
        piece.setAttribute("aria-describedby", "credit-tip");
      });
      reply.addEventListener("mouseover", function (event) { if (pieceOf(event)) tell(pieceOf(event)); });
      reply.addEventListener("mouseleave", hide);
      reply.addEventListener("focusin", function (event) {
        reply.querySelectorAll(".c[tabindex='0']").forEach(function (piece) { piece.tabIndex = -1; });
        event.target.tabIndex = 0;
        tell(event.target);
      });
      reply.addEventListener("focusout", hide);
      reply.addEventListener("keydown", function (event) {
        var piece = pieceOf(event), to = null;
        if (!piece) return;
        if (event.key === "ArrowRight" || event.key === "ArrowDown") to = piece.nextElementSibling;
        else if (event.key === "ArrowLeft" || event.key === "ArrowUp") to = piece.previousElementSibling;
        else if (event.key === "Home") to = reply.firstElementChild;
        else if (event.key === "End") to = reply.lastElementChild;
        else { if (event.key === "Escape") hide(); return; }
        event.preventDefault();
        if (to) to.focus();
      });
    });
    // Going on to a piece out of sight scrolls the page; its numbers go along.
    window.addEventListener("scroll", function () {
      var piece = tip.hidden ? null : document.querySelector(".pieces .c:focus") || document.querySelector(".pieces .c:hover");
      if (piece) tell(piece); else hide();
    }, { passive: true, capture: true });
  }

  var source = find("reply-data");
  if (!source) return;

  // Replies side by side. Only one page of prompts is ever in the document, so size does not slow it down.
  var data = JSON.parse(source.textContent);
  var PAGE = 8, LONG = 520;
  var page = 0, matches = data.prompts;
  var shown = data.arms.map(function (arm) { return arm.kind !== "null"; });
  if (shown.indexOf(true) < 0) shown = data.arms.map(function () { return true; });
  var list = find("reply-list");

  var axes = {};
  data.prompts.forEach(function (item) { axes[item.axis] = (axes[item.axis] || 0) + 1; });
  find("axis").append(new Option("all (" + data.prompts.length + ")", ""));
  Object.keys(axes).forEach(function (axis) { find("axis").append(new Option(axis + " (" + axes[axis] + ")", axis)); });
  data.arms.forEach(function (arm, index) {
    var chip = make("label", "chip"), box = make("input"), face = make("span");
    box.type = "checkbox";
    box.checked = shown[index];
    box.addEventListener("change", function () { shown[index] = box.checked; update(); });
    face.append(swatch(arm), arm.name);
    chip.append(box, face);
    find("arm-chips").append(chip);
  });

  function swatch(arm) {
    // The only markup taken as markup: a marker drawn by the report itself, with no foreign text in it.
    return new DOMParser().parseFromString(arm.swatch, "text/html").body.firstChild;
  }
  function visible(item) { return item.replies.filter(function (reply, index) { return reply && shown[index]; }); }
  function differs(values) { return values.some(function (value) { return value !== values[0]; }); }
  function disagree(replies) {
    var known = replies.filter(function (reply) { return reply.refusal !== null; });
    return differs(replies.map(function (reply) { return !!reply.invalid; })) || differs(known.map(function (reply) { return reply.refusal; }));
  }
  function gap(item) {
    var rewards = visible(item).map(function (reply) { return reply.reward; }).filter(function (reward) { return reward !== null; });
    return rewards.length ? Math.max.apply(null, rewards) - Math.min.apply(null, rewards) : -1;
  }

  function update() {
    var words = find("search").value.trim().toLowerCase(), axis = find("axis").value;
    var only = { disagree: find("disagree").checked, invalid: find("invalid").checked, refusal: find("refusal").checked };
    matches = data.prompts.filter(function (item) {
      if (axis && item.axis !== axis) return false;
      var replies = visible(item);
      if (only.disagree && !disagree(replies)) return false;
      if (only.invalid && !replies.some(function (reply) { return reply.invalid; })) return false;
      if (only.refusal && !replies.some(function (reply) { return reply.refusal; })) return false;
      if (!words) return true;
      var has = function (text) { return text.toLowerCase().indexOf(words) >= 0; };
      return has(item.id) || has(item.topic) || item.prompt.some(function (turn) { return has(turn[1]); }) || replies.some(function (reply) { return has(reply.text); });
    });
    if (find("order").value === "gap") {
      matches = matches.map(function (item) { return [gap(item), item]; })
        .sort(function (a, b) { return b[0] - a[0]; }).map(function (pair) { return pair[1]; });
    }
    page = 0;
    draw();
  }

  function draw() {
    var first = page * PAGE, last = Math.min(first + PAGE, matches.length);
    var needle = find("search").value.trim();
    list.replaceChildren.apply(list, matches.slice(first, last).map(function (item) { return card(item, needle); }));
    var count = matches.length + " of " + data.prompts.length + " prompts";
    find("count").textContent = count + (matches.length > PAGE ? ", showing " + (first + 1) + " to " + last : "");
    find("count-below").textContent = matches.length > PAGE ? (first + 1) + " to " + last + " of " + matches.length : "";
    document.querySelectorAll(".steps button").forEach(function (button) {
      button.disabled = button.dataset.step === "-1" ? page === 0 : last >= matches.length;
    });
  }

  function marked(element, text, needle) {
    var low = text.toLowerCase(), want = needle.toLowerCase(), at = 0, hit;
    // Lower-casing changes the length of a few letters; then positions would be off, so nothing is marked.
    while (want && low.length === text.length && (hit = low.indexOf(want, at)) >= 0) {
      element.append(text.slice(at, hit), make("mark", "", text.slice(hit, hit + want.length)));
      at = hit + want.length;
    }
    element.append(text.slice(at));
    return element;
  }

  function card(item, needle) {
    var article = make("article", "prompt-card"), heading = make("h3"), side = make("div", "side");
    heading.append(make("b", "", item.axis), make("span", "", item.id));
    if (item.topic) heading.append(make("span", "", item.topic));
    article.append(heading);
    item.prompt.forEach(function (turn) {
      var line = make("p", "turn");
      line.dir = "auto";
      if (item.prompt.length > 1) line.append(make("i", "", turn[0]));
      article.append(marked(line, turn[1], needle));
      if (turn[1].length > 2 * LONG) article.append(more(line));
    });
    var rewards = visible(item).map(function (reply) { return reply.reward; }).filter(function (reward) { return reward !== null; });
    var best = rewards.length > 1 && differs(rewards) ? Math.max.apply(null, rewards) : null;
    data.arms.forEach(function (arm, index) { if (shown[index]) side.append(box(arm, item.replies[index], best, needle)); });
    side.tabIndex = 0;
    side.setAttribute("role", "group");
    side.setAttribute("aria-label", "Replies to " + item.id);
    article.append(side);
    return article;
  }

  function box(arm, reply, best, needle) {
    var element = make("div", "reply"), top = make("header"), text = make("p", "text");
    top.append(swatch(arm), make("b", "", arm.name));
    element.append(top);
    if (!reply) {
      text.append(make("em", "", "no reply recorded"));
      element.append(text);
      return element;
    }
    var score = make("data", reply.reward !== null && reply.reward === best ? "top" : "");
    score.textContent = reply.reward === null ? "no reward" : reply.reward.toFixed(2).replace("-", "\u2212");
    score.title = "reward by the judge" + (score.className ? ", highest of the arms shown" : "");
    top.append(score);
    var tags = make("p", "tags");
    if (reply.invalid) tags.append(make("span", "bad", "invalid" + (typeof reply.invalid === "string" ? ": " + reply.invalid : "")));
    if (reply.refusal) tags.append(make("span", "", "refuses"));
    if (tags.firstChild) element.append(tags);
    element.classList.toggle("invalid", !!reply.invalid);
    text.dir = "auto";
    marked(text, reply.text, needle);
    if (!reply.text.trim()) text.append(make("em", "", reply.text ? "(only white space)" : "(empty)"));
    if (reply.cut) text.append(make("em", "", " … cut for display; the whole reply has " + reply.cut.toLocaleString("en") + " characters"));
    element.append(text);
    if (reply.text.length > LONG || reply.text.split("\n").length > 9) element.append(more(text));
    return element;
  }

  function more(text) {
    var button = make("button", "more", "Show all");
    button.type = "button";
    text.classList.add("clamped");
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", function () {
      var open = !text.classList.toggle("clamped");
      button.textContent = open ? "Show less" : "Show all";
      button.setAttribute("aria-expanded", String(open));
    });
    return button;
  }

  var timer = 0;
  find("search").addEventListener("input", function () { window.clearTimeout(timer); timer = window.setTimeout(update, 120); });
  ["axis", "order", "disagree", "invalid", "refusal"].forEach(function (id) { find(id).addEventListener("change", update); });
  document.querySelector(".controls").addEventListener("submit", function (event) { event.preventDefault(); update(); });
  document.querySelectorAll(".steps button").forEach(function (button) {
    button.addEventListener("click", function () {
      page += Number(button.dataset.step);
      draw();
      document.querySelector(".pager").scrollIntoView({ block: "start" });
    });
  });
  draw();
})();
