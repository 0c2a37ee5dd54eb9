/*
 * guc.h
 *		Settings of softmobile: the variables, and what checks them.
 */
#ifndef SM_GUC_H
#define SM_GUC_H

/* Longest branch id and reason, in bytes; the tables and shared memory rely on them. */
#define SM_BRANCH_MAX	100
#define SM_REASON_MAX	2000

typedef enum SmUnknownBranch
{
	SM_UNKNOWN_REGISTER,
	SM_UNKNOWN_REFUSE
} SmUnknownBranch;

typedef enum SmCompression
{
	SM_COMPRESSION_NONE,
	SM_COMPRESSION_GZIP
} SmCompression;

/* central: where events go and as whom */
extern char *sm_central_url;
extern char *sm_auth_token_file;
extern char *sm_signing_key_file;
extern char *sm_ca_file;
extern char *sm_client_cert_file;
extern char *sm_client_key_file;
extern char *sm_central_networks;

/* capture */
extern char *sm_branch_id;
extern char *sm_reason;
extern int	sm_unknown_branch;
extern bool sm_enable_purchases_sales;
extern bool sm_enable_transfers;
extern bool sm_enable_hybrid_prep;

/* delivery; intervals in seconds, timeouts in milliseconds */
extern int	sm_sync_interval;
extern int	sm_retry_interval;
extern int	sm_probe_interval;
extern int	sm_max_attempts;
extern int	sm_batch_max_events;
extern int	sm_batch_max_bytes;
extern int	sm_compression;
extern int	sm_connect_timeout;
extern int	sm_request_timeout;
extern int	sm_retention;
extern char *sm_worker_role;
extern bool sm_drop_undelivered;

/* offline operation; minutes, kilobytes */
extern int	sm_central_backup_window;
extern int	sm_reference_max_size;

extern void sm_guc_init(void);

/* Worker: warns of each flag softmobile.enable_* that is off, once until it is on again. */
extern void sm_guc_report_flags(void);

/* NULL when the URL can be a central_url, else what is wrong with it. */
extern const char *sm_guc_url_problem(const char *url);

/* NULL when the text can be a branch id, else what is wrong with it. */
extern const char *sm_guc_branch_problem(const char *branch);

#endif							/* SM_GUC_H */
