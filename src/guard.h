/*
 * guard.h
 *		Refuses to drop the extension while events are undelivered.
 */
#ifndef SM_GUARD_H
#define SM_GUARD_H

#include "nodes/nodes.h"

/* Before an object is deleted; flags: PERFORM_DELETION_*. */
extern void sm_guard_drop(Oid classId, Oid objectId, int subId, int flags);

/*
 * Does a command take a table out of the extension, after which it can be dropped
 * alone?  Then, once that is done and its user's right to it is checked, call the
 * second.
 */
extern bool sm_guard_concerned(const Node *command);
extern void sm_guard_table_taken_out(void);

extern void sm_guard_init(void);

#endif							/* SM_GUARD_H */
