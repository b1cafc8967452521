"""Front ends: command line, notebook session and widget, figures and pages; the only room that prints."""
