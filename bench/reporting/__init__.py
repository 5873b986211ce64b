"""The page and the charts that ``bench report`` makes of results files."""
