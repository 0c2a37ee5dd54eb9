/*
 * capture.h
 *		The capture trigger: see capture.c.
 */
#ifndef SM_CAPTURE_H
#define SM_CAPTURE_H

extern void sm_capture_init(void);

/* True when this transaction has captured something. */
extern bool sm_capture_in_transaction(void);

#endif							/* SM_CAPTURE_H */
