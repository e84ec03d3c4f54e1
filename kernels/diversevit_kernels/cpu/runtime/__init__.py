"""What all CPU operators share: compiling and caching libraries, allocating results, scratch memory."""
