// Colours for the sockets and links of this package's own types; everything else is core's.
import { app } from "../../scripts/app.js"; // relative: the page may lie under any path

const COLORS = {
  SKYREELS_MODEL: "#B39DDB", // as core's MODEL
  SKYREELS_VAE: "#FF6E6E", // as core's VAE
  SKYREELS_TEXT_ENCODER: "#FFD500", // as core's CLIP
  SKYREELS_IMAGE: "#6EE7B7",
};

// the page fills both tables anew when it applies a colour palette, after `setup`
function paint() {
  try {
    Object.assign(app.canvas.constructor.link_type_colors, COLORS);
    Object.assign(app.canvas.default_connection_color_byType, COLORS);
  } catch (error) {
    console.warn("[SkyReels] socket colours are not set:", error); // the graph works without
  }
}

app.registerExtension({
  name: "skyreels.colors",
  setup: paint,
  afterConfigureGraph: paint,
});
