"""Tables, progress, plots and pages for people: the only room that knows Rich."""
