// Colours of this package's own socket types; all others are ComfyUI's.
import { app } from "../../scripts/app.js"; // relative: the page may lie under any path

const COLORS = {
  SKYREELS_MODEL: "#B39DDB", // as MODEL
  SKYREELS_VAE: "#FF6E6E", // as VAE
  SKYREELS_TEXT_ENCODER: "#FFD500", // as CLIP
  SKYREELS_IMAGE: "#6EE7B7",
  SKYREELS_GUIDANCE: "#F9A8D4",
  SKYREELS_WINDOWS: "#FDBA74",
};

// applying a colour palette resets both tables after `setup`
function paint() {
  try {
    Object.assign(app.canvas.constructor.link_type_colors, COLORS);
    Object.assign(app.canvas.default_connection_color_byType, COLORS);
  } catch (error) {
    console.warn("[SkyReels] cannot set socket colours:", error); // the graph works without
  }
}

app.registerExtension({
  name: "skyreels.colors",
  setup: paint,
  afterConfigureGraph: paint,
});
