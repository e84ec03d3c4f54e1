"""What each head does: which attribute of the images it uses, holds, and looks at."""
