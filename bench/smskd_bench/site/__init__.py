"""A board as a static site: ``smskd-bench report --html DIR``."""
