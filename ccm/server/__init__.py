"""The production server: waitress, its connections and the listening socket."""
