// Shows the OpenAPI document with Scalar.

import { base, read, show, token } from "./access.js";

// The extensions that /openapi.json explains in its description.
const EXTENSIONS = ["x-default-setting", "x-ceiling-setting", "x-allowed-by-setting", "x-privileged"];
// The first tags; the others follow as in the document, which sorts them by name.
const FIRST = ["runs", "sessions", "approvals", "events"];

// Orders the tags for reading, and shows their names as titles.
function arrange(tags) {
  const place = tag => (FIRST.indexOf(tag.name) + FIRST.length + 1) % (FIRST.length + 1);
  const titled = tags.map(tag => ({ "x-displayName": tag.name[0].toUpperCase() + tag.name.slice(1), ...tag }));
  return titled.sort((one, other) => place(one) - place(other));
}

function loaded(script) {
  return new Promise((resolve, reject) => {
    if (window.Scalar) resolve();
    script.onload = resolve;
    script.onerror = () => reject(new Error("The script of the reference could not be loaded. Reload the page."));
  });
}

await show(async () => {
  const description = await (await read("/openapi.json")).json();
  await loaded(document.getElementById("scalar"));
  document.querySelector(".docs-loading").remove();
  const [scheme] = Object.keys(description.components?.securitySchemes ?? {});
  window.Scalar.createApiReference("#reference", {
    content: { ...description, tags: arrange(description.tags) },
    servers: [{ url: location.origin + base }],
    authentication: { preferredSecurityScheme: scheme, securitySchemes: { [scheme]: { token: token() ?? "" } } },
    // /docs#tag/runs/startRun
    generateOperationSlug: ({ operationId }) => operationId,
    showOperationId: true,
    showExtensions: EXTENSIONS,
    orderSchemaPropertiesBy: "preserve",
    defaultHttpClient: { targetKey: "shell", clientKey: "curl" },
    customCss: "", // style.css
    withDefaultFonts: false,
    hideDarkModeToggle: true, // the browser's setting decides, as for the guides
    documentDownloadType: "none", // the link would lack the token
    // Nothing is sent to Scalar's own services; the page's Content-Security-Policy forbids it as well.
    telemetry: false,
    hideClientButton: true,
    showDeveloperTools: "never",
    agent: { disabled: true },
    mcp: { disabled: true },
  });
});
