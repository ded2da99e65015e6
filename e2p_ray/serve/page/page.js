// The editors' page: one content, each user's text beside its original title. Whatever the service says is shown as
// text (textContent), never as markup; the token lies in this tab's sessionStorage and nowhere else.
"use strict";

const MAX_USERS = 12;
const SEARCH_PAUSE_MS = 200;
const TOKEN = "e2p_ray.token";

const WORDS = {
  en: {
    heading: "One content, each user's text", pageLanguage: "Language of this page", token: "Token", use: "Use",
    forget: "Forget it", tokenNote: "Kept in this tab only, until it is closed.", content: "Content",
    fromTable: "of the contents table", fromDraft: "a draft of mine (nothing is stored)",
    contentId: "Id, or words of the title", draftLanguage: "Language of the draft", draftTitle: "Title",
    draftBody: "Body", users: "User ids, one a line", usersNote: "{n} at most.", task: "Task",
    write: "Show their texts", results: "Texts", original: "Original title", noTitle: "(no title)",
    waiting: "waiting …", someDone: "{done} of {all} texts are here.", allDone: "All {all} texts are here.",
    status: "Status", reason: "Reason", source: "Source", personalized: "Personalised", time: "Time",
    consent: "Consent", id: "Id", textLanguage: "Language", projector: "Projector", yes: "yes", no: "no",
    ok: "ok", fallback: "fallback", suppressed: "suppressed", published: "published before", generated: "written now",
    given: "given", refused: "refused", unknown: "unknown user",
    took: "{service} ms in the service, {way} ms for this page", served: "Projector {projector}, base model {base}.",
    badToken: "The service does not know this token.", needToken: "Give a token first.",
    noContent: "Choose a content.", noSuchContent: "The contents table has no content with this id.",
    noDraft: "The draft has neither a title nor a body.", noUsers: "Give a user id.",
    manyUsers: "{n} users at most.", problem: "Problem", unreachable: "The service did not answer.",
    found: "Title: {title}", foundSome: "{n} contents found; choose one.", foundMore: "The first {n} contents found.",
    foundNone: "No content begins or is called like this.",
  },
  ja: {
    heading: "一つのコンテンツと、利用者ごとの文", pageLanguage: "このページの言語", token: "トークン", use: "使う",
    forget: "忘れる", tokenNote: "このタブを閉じるまで、このタブだけに保存します。", content: "コンテンツ",
    fromTable: "コンテンツ表から選ぶ", fromDraft: "下書きを入力する（保存されません）",
    contentId: "ID、またはタイトルの一部", draftLanguage: "下書きの言語", draftTitle: "タイトル",
    draftBody: "本文", users: "利用者ID（一行に一つ）", usersNote: "最大 {n} 人。", task: "タスク",
    write: "文を表示する", results: "文", original: "元のタイトル", noTitle: "（タイトルなし）",
    waiting: "待っています…", someDone: "{all} 件のうち {done} 件が届きました。", allDone: "{all} 件すべて届きました。",
    status: "状態", reason: "理由", source: "出所", personalized: "個人化", time: "時間",
    consent: "同意", id: "ID", textLanguage: "言語", projector: "プロジェクター", yes: "はい", no: "いいえ",
    ok: "合格", fallback: "代替", suppressed: "個人化なし（同意なし）", published: "公開済み", generated: "今書いた",
    given: "あり", refused: "拒否", unknown: "不明な利用者",
    took: "サービス内 {service} ms、このページで {way} ms", served: "プロジェクター {projector}、基盤モデル {base}。",
    badToken: "このトークンは使えません。", needToken: "先にトークンを入力してください。",
    noContent: "コンテンツを選んでください。", noSuchContent: "このIDのコンテンツはありません。",
    noDraft: "下書きにタイトルも本文もありません。", noUsers: "利用者IDを入力してください。",
    manyUsers: "利用者は最大 {n} 人です。", problem: "問題", unreachable: "サービスが応答しません。",
    found: "タイトル：{title}", foundSome: "{n} 件見つかりました。一つ選んでください。", foundMore: "最初の {n} 件です。",
    foundNone: "該当するコンテンツはありません。",
  },
};

const at = (id) => document.getElementById(id);
let words = WORDS.en;
let running = new AbortController();
let searching = new AbortController();
let searchTimer = 0;
let shown = null; // what the results show, to say it again in another language
let messages = new Map(); // element -> [name of the words, values]

function said(name, values = {}) {
  return words[name].replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}

function say(element, name, values) {
  messages.set(element, [name, values]);
  element.textContent = name ? said(name, values) : "";
}

function made(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// -- talking with the service

class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

function token() {
  return sessionStorage.getItem(TOKEN);
}

async function asked(path, { body, signal, as = token() } = {}) {
  const headers = { Accept: "application/json" };
  if (as) headers.Authorization = `Bearer ${as}`;
  if (body) headers["Content-Type"] = "application/json";
  let response, answer;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
      cache: "no-store", credentials: "omit", redirect: "error",
    });
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(response ? response.status : 0, "unreachable", words.unreachable);
  }
  if (!response.ok) {
    const where = (answer.errors || []).map((error) => `${error.at}: ${error.message}`).join("; ");
    throw new Problem(response.status, answer.code, where ? `${answer.detail} (${where})` : answer.detail);
  }
  return answer;
}

function complain(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    say(at("trouble"), token() ? "badToken" : "needToken");
    at("token").focus();
  } else {
    messages.delete(at("trouble"));
    at("trouble").textContent = error.code ? `${error.code}: ${error.message}` : String(error.message);
  }
}

// -- the token

async function connect(as) {
  const models = await asked("v1/models", { as });
  if (as) sessionStorage.setItem(TOKEN, as);
  const chosen = at("task").value;
  at("task").replaceChildren(...models.tasks.map((task) => {
    const option = made("option", task);
    option.value = task;
    return option;
  }));
  if (models.tasks.includes(chosen)) at("task").value = chosen;
  say(at("served"), "served", { projector: models.projector_id, base: models.base_model_id });
  say(at("trouble"), "");
}

at("access").addEventListener("submit", async (event) => {
  event.preventDefault();
  const given = at("token").value.trim();
  try {
    await connect(given);
    at("token").value = "";
    at("content-id").focus();
  } catch (error) {
    say(at("served"), "");
    if (error.status === 401) {
      sessionStorage.removeItem(TOKEN);
      say(at("trouble"), given ? "badToken" : "needToken");
      at("token").focus();
    } else complain(error);
  }
});

at("forget").addEventListener("click", () => {
  running.abort();
  sessionStorage.removeItem(TOKEN);
  at("token").value = "";
  at("task").replaceChildren();
  at("contents").replaceChildren();
  say(at("content-note"), "");
  say(at("served"), "");
  say(at("progress"), "");
  shown = null;
  show();
  at("token").focus();
});

// -- choosing a content

function isDraft() {
  return document.querySelector("input[name=from]:checked").value === "draft";
}

for (const choice of document.querySelectorAll("input[name=from]")) {
  choice.addEventListener("change", () => {
    at("table-part").hidden = isDraft();
    at("draft-part").hidden = !isDraft();
  });
}

at("content-id").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, SEARCH_PAUSE_MS);
});

function contentsPath(words, limit) {
  return `v1/contents?${new URLSearchParams({ search: words, limit })}`;
}

async function search() {
  searching.abort();
  searching = new AbortController();
  const typed = at("content-id").value.trim();
  try {
    const answer = await asked(contentsPath(typed, 20), { signal: searching.signal });
    const options = answer.contents.map((content) => {
      const option = document.createElement("option");
      option.value = content.content_id;
      option.label = content.title;
      return option;
    });
    at("contents").replaceChildren(...options);
    const exact = answer.contents.find((content) => content.content_id === typed);
    if (exact) say(at("content-note"), "found", { title: exact.title || words.noTitle });
    else if (!options.length) say(at("content-note"), "foundNone");
    else say(at("content-note"), answer.complete ? "foundSome" : "foundMore", { n: options.length });
  } catch (error) {
    complain(error);
  }
}

async function pickedContent(signal) {
  if (isDraft()) {
    const draft = {
      title: at("draft-title").value.trim(), body: at("draft-body").value,
      language: at("draft-language").value.trim(),
    };
    if (!draft.title && !draft.body.trim()) throw new Problem(0, "", words.noDraft);
    return { title: draft.title, language: draft.language, part: { content: draft } };
  }
  const id = at("content-id").value.trim();
  if (!id) throw new Problem(0, "", words.noContent);
  const answer = await asked(contentsPath(id, 1), { signal });
  const [found] = answer.contents.filter((content) => content.content_id === id);
  if (!found) throw new Problem(404, "unknown_content", words.noSuchContent);
  return { title: found.title, language: found.language, id, part: { content_id: id } };
}

// -- the texts

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  running.abort();
  running = new AbortController();
  const { signal } = running;
  say(at("trouble"), "");
  try {
    const users = [...new Set(at("users").value.split("\n").map((line) => line.trim()).filter(Boolean))];
    if (!at("task").value) throw new Problem(401, "", "");
    if (users.length > MAX_USERS) throw new Problem(0, "", said("manyUsers", { n: MAX_USERS }));
    const content = await pickedContent(signal);
    if (!users.length) throw new Problem(0, "", words.noUsers);
    shown = { content, texts: users.map((user) => ({ user })) };
    show();
    at("results-heading").focus();
    await Promise.all(shown.texts.map((text) => write(text, content, at("task").value, signal)));
  } catch (error) {
    complain(error);
  }
});

async function write(text, content, task, signal) {
  const began = performance.now();
  try {
    text.answer = await asked("v1/generations", { body: { user_id: text.user, task, ...content.part }, signal });
  } catch (error) {
    if (error.name === "AbortError") return;
    text.problem = error;
  }
  text.wayMs = performance.now() - began;
  if (signal.aborted) return;
  text.card.replaceWith(card(text, content));
  tellProgress();
}

function tellProgress() {
  if (shown === null) return;
  const all = shown.texts.length, done = shown.texts.filter((text) => text.answer || text.problem).length;
  say(at("progress"), done === all ? "allDone" : "someDone", { done, all });
}

function show() {
  if (shown === null) {
    at("results").replaceChildren();
    return;
  }
  const { content, texts } = shown;
  const original = made("article", undefined, "original");
  original.append(made("h3", words.original), textOf(content.title || words.noTitle, content.language));
  original.append(factsOf({ id: content.id, textLanguage: content.language }));
  at("results").replaceChildren(original, ...texts.map((text) => card(text, content)));
  tellProgress();
}

function card(text, content) {
  const { answer, problem } = text;
  const article = made("article", undefined, problem ? "problem" : answer ? answer.status : "");
  article.append(made("h3", text.user));
  if (answer) {
    article.append(textOf(answer.text, content.language));
    article.append(factsOf({
      status: words[answer.status], reason: answer.reason && answer.reason.replaceAll("_", " "),
      source: words[answer.source], personalized: answer.personalized ? words.yes : words.no,
      consent: answer.consent && words[answer.consent],
      time: said("took", { service: answer.took_ms.toFixed(1), way: text.wayMs.toFixed(1) }),
      projector: answer.projector_id,
    }));
  } else if (problem) {
    article.append(made("p", `${problem.code}: ${problem.message}`, "trouble"));
  } else {
    article.append(made("p", words.waiting, "note"));
  }
  text.card = article;
  return article;
}

function textOf(text, language) {
  const paragraph = made("p", text, "text");
  paragraph.lang = language;
  paragraph.dir = "auto";
  return paragraph;
}

function factsOf(facts) {
  const list = document.createElement("dl");
  for (const [name, value] of Object.entries(facts)) {
    if (value) list.append(made("dt", words[name]), made("dd", value));
  }
  return list;
}

// -- the language of the page

function speak(language) {
  words = WORDS[language];
  document.documentElement.lang = language;
  at("ui").value = language;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = words[element.dataset.say];
  say(at("users-note"), "usersNote", { n: MAX_USERS });
  for (const [element, [name, values]] of messages) element.textContent = name ? said(name, values) : "";
  show();
}

at("ui").addEventListener("change", () => speak(at("ui").value));
speak(navigator.language.startsWith("ja") ? "ja" : "en");
// A service that lets anybody in needs no token; else nothing is said until one is given.
connect(token()).catch((error) => { if (error.status !== 401) complain(error); });
