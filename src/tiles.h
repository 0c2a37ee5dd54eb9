/*
 * tiles.h
 *		Counting the log, block by block: see tiles.c.
 */
#ifndef SM_TILES_H
#define SM_TILES_H

/* Whether it is time; the work, within sm_outbox_begin() and its commit; until when to wait. */
extern bool sm_tiles_due(void);
extern void sm_tiles_write(void);
extern long sm_tiles_timeout_ms(void);

#endif							/* SM_TILES_H */
