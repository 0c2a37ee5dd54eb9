/*
 * answer.h
 *		What becomes of a batch when its answer is there: see answer.c.
 */
#ifndef SM_ANSWER_H
#define SM_ANSWER_H

#include "delivery.h"
#include "http.h"

/* All within sm_outbox_begin() and its commit; the batch may be freed. */
extern void sm_answer_handle(SmBatch *batch, const SmHttpResult *result);
extern void sm_answer_unsendable(SmBatch *batch, const char *error);
extern void sm_answer_nothing_else(SmLane *lane);

/* Within a transaction. */
pg_nodiscard extern bool sm_answer_accepts_all(const SmBatch *batch, const SmHttpResult *result);

#endif							/* SM_ANSWER_H */
