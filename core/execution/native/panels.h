/* Sizes of `panels.c`. */
#pragma once

#define PANEL 16       /* rows of W */
#define BLOCK 32       /* elements of K that a word of every plane is part of */
#define MOST_SPAN 128  /* elements of x that share a power of two */
#define BITS 13        /* of the largest number of a span, after the first */
#define ROW_TILE 6     /* lines x 16 rows of W: 12 accumulators, 2 weights and 2 products fill 16 registers */
#define BAND 120       /* lines that a panel is multiplied with before the next panel */
