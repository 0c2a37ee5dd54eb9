/*
 * hooks.h
 *		Commands of others that workers must make way for, or learn of.
 */
#ifndef SM_HOOKS_H
#define SM_HOOKS_H

extern void sm_hooks_init(void);

#endif							/* SM_HOOKS_H */
