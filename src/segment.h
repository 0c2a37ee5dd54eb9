/*
 * segment.h
 *		Recycling of the outbox's segments: see segment.c.
 */
#ifndef SM_SEGMENT_H
#define SM_SEGMENT_H

/* True while this backend empties a segment by softmobile.recycle_segment(). */
extern bool sm_segment_recycling(void);

#endif							/* SM_SEGMENT_H */
