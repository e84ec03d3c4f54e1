"""What every CPU kernel needs: compilers, the folder of compiled files, memory."""
