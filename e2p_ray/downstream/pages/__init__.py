"""How what was found is shown: terminal lines and self-contained HTML pages."""
