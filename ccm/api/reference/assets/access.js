// Reads from the service, with a token if it requires one. The token is kept in sessionStorage, which belongs to one tab,
// and is sent in a header only.

export const base = document.documentElement.dataset.base;
// With the base, because services under other prefixes of this origin have tokens of their own.
const KEY = `ccm-token:${base}`;

export const token = () => sessionStorage.getItem(KEY);

// Returns the response to a GET. Asks for a token until one is accepted.
// Throws an Error with a sentence for the user.
export async function read(path) {
  let asks = "asksForToken" in document.documentElement.dataset;
  for (let refused = ""; ; asks = true) {
    if (!token() && asks) sessionStorage.setItem(KEY, await ask(refused));
    const response = await get(path);
    if (response.status !== 401) {
      if (!response.ok) throw new Error(await problem(response));
      return response;
    }
    refused = token() ? "This token was not accepted. Check it, or ask the operator for one." : "";
    sessionStorage.removeItem(KEY);
  }
}

async function get(path) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  try {
    return await fetch(base + path, { headers, cache: "no-cache" });
  } catch (error) {
    throw new Error(`The service cannot be reached (${error.message}). Reload the page to try again.`);
  }
}

async function problem(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The answer was ${response.status} ${response.statusText}.`; // it may be a proxy's own page
  }
}

// Shows the form, and returns what was entered.
function ask(refused) {
  const [access, form, input] = ["access", "token-form", "token"].map(id => document.getElementById(id));
  document.getElementById("token-error").textContent = refused;
  document.body.classList.add("docs-asking");
  access.hidden = false;
  input.value = "";
  input.focus();
  return new Promise(resolve => {
    form.onsubmit = event => {
      event.preventDefault();
      // No header can carry other characters, and no token has them.
      const entered = input.value.replace(/[^\x21-\x7e]/g, "");
      access.hidden = true;
      document.body.classList.remove("docs-asking");
      resolve(entered);
    };
  });
}

// Runs the script of a page, and shows why it failed.
export async function show(page) {
  try {
    await page();
    const forget = document.getElementById("forget-token");
    forget.hidden = !token();
    forget.onclick = () => {
      sessionStorage.removeItem(KEY);
      location.reload();
    };
  } catch (error) {
    const failure = document.getElementById("failure");
    failure.textContent = error.message;
    failure.hidden = false;
    document.querySelector(".docs-loading")?.remove();
    console.error(error);
  }
}
