"""The command line's commands by topic. Modules here import what a command needs when it runs, not before."""
