"""The Wiro client. Nothing is here yet: this version runs SkyReels-V1 locally only."""

__all__: list[str] = []
